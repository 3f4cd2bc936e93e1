"""TTC: test-time counterattacks (Xing et al., CVPR 2025, arXiv 2503.03613; METHODS.md 4, from the official code).

    d_0 = eps u,  u ~ U[-1, 1);   a = f(x);   tau = |f_0(x + d_0) - f_0(x)| / |f_0(x)|
    d_i = P(d_{i-1} + alpha sign grad_d |f(x + d_{i-1}) - a|^2),  i = 1..N;   P cuts to [-eps, eps], then to the pixel box
    classify x + sum_i w_i d_i:   w_i ~ exp(beta i) if tau < threshold,  else w = (1, 0, ..., 0)

with f the served tower's features before normalisation and f_0 those of the pre-trained tower it came from. The idea: an
attacked image sits where noise hardly moves its features ("falsely stable"), so it is driven away from where it is.

Cost of a prediction: 2 + 2 N units (6 at N = 2) where f_0 is f, 4 + 2 N where it is not, 1 at N = 0; a plain one takes 1.

This is no defence against an attacker who knows it. Published gains are against attacks crafted on the bare model. With the
counterattack in the attacker's backward pass (BPDA) 2.4 % are left, averaged over 10 sets at 4/255 [NOTE: the MAC paper's];
CLIP ViT-B/16 with TTC on ImageNet keeps 2.7 % under 50-step PGD at 4/255 and 0.3 % under AutoAttack [PAPER: BaP].

What differs from the official code: no fp16 autocast anywhere (the model's own precision, fp32 or bf16); noise belongs to
the sample and not to the batch; a running weighted sum in place of N + 1 stored images per sample; where f_0 is f, tau is
read off the counterattack's first pass instead of one of its own.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from zsr.config.base import PixelUnits, Weight
from zsr.defenses.base import Defense, DefenseConfig, Through, Tower

_TINY = 1e-12  # an all-zero feature has no relative shift; this makes it a huge one, not NaN


class TTCConfig(DefenseConfig):
    name: Literal["ttc"] = "ttc"
    eps: PixelUnits = 4 / 255
    """Largest counter-perturbation, L-inf; pixels span [0, 1], so write 4/255."""
    step_size: PixelUnits = 1 / 255
    num_steps: Annotated[int, Field(ge=0)] = 2
    """Counterattack steps N; 0 classifies the image plus noise."""
    beta: Annotated[float, Field(allow_inf_nan=False)] = 2.0
    """How much later iterates outweigh earlier ones; 0 averages them."""
    threshold: Weight = 0.2
    """Relative feature shift under noise below which an image counts as attacked; 0 never triggers. The default is that of
    CLIP ViT-B/32. Look at tau on your own tower first: on zsr:emoji-vit noise moves attacked images more than clean ones
    (median 0.07 against 0.02 on zsr:emoji/val, PGD-10 at 4/255): the default triggers on nearly all, none picks those."""

    @model_validator(mode="after")
    def _in_pixel_units(self) -> TTCConfig:
        for setting in ("eps", "step_size"):
            value = getattr(self, setting)
            if value > 1:
                raise ValueError(
                    f"{setting}={value:g} is more than the whole pixel range [0, 1]; "
                    f"write {value:g}/255 for {value:g} grey levels"
                )
        return self


class TTC(Defense[TTCConfig]):
    """Counterattack images that look attacked; add noise to all others."""

    def cost_units(self, own_gate: bool = False) -> int:
        if self.config.num_steps == 0:
            return 1
        return 2 + 2 * self.config.num_steps + 2 * own_gate

    def purify(self, victim: Tower, frozen: Tower, image_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        # Gradients are needed here whatever the caller switched off; inference mode needs its own switch.
        with torch.inference_mode(False), torch.no_grad():
            return self._purify(victim, frozen, image_BCHW, noise_BCHW)[0]

    def purify_differentiably(
        self, victim: Tower, frozen: Tower, image_BCHW: Tensor, noise_BCHW: Tensor, through: Through
    ) -> tuple[Tensor, Tensor]:
        """See the base class. The margin is ``threshold - tau``, and the gate is the constant that it was.

        Cuts pass gradients as if they were not there (BPDA, Athalye et al., ICML 2018). A sign passes them as the straight line
        through zero that fits it best over a sample's pixels does [RECON]: taken for the identity, as METHODS.md (b) 8 has
        it, a step would count for as much as the unit that features happen to have (on zsr:emoji-vit, a hundredth).
        """
        return self._purify(victim, frozen, image_BCHW, noise_BCHW, unrolled=through == "unrolled")

    def _purify(
        self, victim: Tower, frozen: Tower, image_BCHW: Tensor, noise_BCHW: Tensor, unrolled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Purified images and gate margins, with gradients if the image wants them and they are on."""
        delta_BCHW = self._project(noise_BCHW * self.config.eps, image_BCHW)
        if self.config.num_steps == 0:  # either branch of the gate is the noise alone
            return _into_box(image_BCHW + delta_BCHW), image_BCHW.new_zeros(len(image_BCHW))
        anchor_BD = victim(image_BCHW).raw_BD
        tau_B = None
        if frozen is not victim:
            tau_B = relative_shift(frozen(image_BCHW + delta_BCHW).raw_BD, frozen(image_BCHW).raw_BD)
        first_weight, *weights = self.weights()
        mixed_BCHW = delta_BCHW
        for step, weight in enumerate(weights):
            shifted_BD, grad_BCHW = _away_from(anchor_BD, victim, image_BCHW + delta_BCHW, unrolled)
            if step == 0:
                if tau_B is None:
                    tau_B = relative_shift(shifted_BD, anchor_BD)
                stable_B111 = (tau_B < self.config.threshold).view(-1, 1, 1, 1)
                mixed_BCHW = torch.where(stable_B111, first_weight * delta_BCHW, delta_BCHW)
            sign_BCHW = _straight_through(grad_BCHW.sign(), _fitted_slope(grad_BCHW) * grad_BCHW)
            delta_BCHW = self._project(delta_BCHW + self.config.step_size * sign_BCHW, image_BCHW)
            # The gate is a select, not a branch: no wait for the device, and both kinds of image share a batch.
            mixed_BCHW = torch.where(stable_B111, mixed_BCHW + weight * delta_BCHW, mixed_BCHW)
        assert tau_B is not None
        return _into_box(image_BCHW + mixed_BCHW), self.config.threshold - tau_B

    def weights(self) -> list[float]:
        """Of iterates 0..N, for images that trigger; they sum to 1."""
        exponents = self.config.beta * torch.arange(self.config.num_steps + 1, dtype=torch.float64)
        return torch.softmax(exponents, 0).tolist()

    def _project(self, delta_BCHW: Tensor, image_BCHW: Tensor) -> Tensor:
        """Cut to the budget, then to the pixel box; the second cut only shortens, so the first still holds."""
        cut_BCHW = delta_BCHW.clamp(-self.config.eps, self.config.eps).clamp(-image_BCHW, 1 - image_BCHW)
        return _straight_through(cut_BCHW, delta_BCHW)


def relative_shift(shifted_BD: Tensor, anchor_BD: Tensor) -> Tensor:
    """tau ``[B]``: how far features moved, in lengths of the features themselves."""
    moved_B: Tensor = torch.linalg.vector_norm(shifted_BD - anchor_BD, dim=-1)
    return moved_B / torch.linalg.vector_norm(anchor_BD, dim=-1).clamp_min(_TINY)


def _away_from(anchor_BD: Tensor, victim: Tower, image_BCHW: Tensor, unrolled: bool) -> tuple[Tensor, Tensor]:
    """Features of the images, and the gradient of their summed squared distance from the anchor by pixel.

    The features keep their graph where gradients are on, the gradient keeps one if ``unrolled``.
    """
    differentiable = torch.is_grad_enabled() and image_BCHW.requires_grad
    image_BCHW = image_BCHW.requires_grad_(True)
    with torch.enable_grad():
        shifted_BD = victim(image_BCHW).raw_BD
        distance = (shifted_BD - anchor_BD).square().sum()
        (grad_BCHW,) = torch.autograd.grad(distance, image_BCHW, retain_graph=differentiable, create_graph=unrolled)
    return shifted_BD if differentiable else shifted_BD.detach(), grad_BCHW


def _fitted_slope(grad_BCHW: Tensor) -> Tensor:
    """The c of each sample, ``[B, 1, 1, 1]``, for which ``c grad`` is closest to ``sign(grad)``: sum |g| / sum g^2."""
    flat = grad_BCHW.detach().flatten(1)
    return (flat.abs().sum(1) / flat.square().sum(1).clamp_min(torch.finfo(flat.dtype).tiny)).view(-1, 1, 1, 1)


def _into_box(image_BCHW: Tensor) -> Tensor:
    return _straight_through(image_BCHW.clamp(0, 1), image_BCHW)


def _straight_through(value: Tensor, like: Tensor) -> Tensor:
    """``value`` to the bit, with the gradient of ``like``."""
    if not like.requires_grad:
        return value.detach()
    return value.detach() + (like - like.detach())
