"""Adaptive: an attack on a model behind a test-time defence, by someone who knows the defence (METHODS.md (b) 8).

    max over the ball of  E_u [ CE(h(D(x + delta, u)), y) - w relu(threshold - tau(x + delta, u)) ]

D is the defence and u its noise; h classifies. The expectation is the mean over ``eot`` draws (EOT, Athalye et al., ICML 2018,
arXiv 1802.00420), new ones at each step, from the attacker's own random numbers. Gradients go back through the defence by BPDA
(same paper): ``unrolled`` through each counterattack step, which takes gradients of gradients, with cuts left out and, in
place of the sign of a gradient, the straight line that fits it best (zsr/defenses/ttc.py says why); ``identity`` as if
the defence added a constant. The second term is how far an image is inside the region where the defence acts: with it, the
attack leaves that region and the defence falls back to noise. METHODS.md gives its sign; no paper gives its weight w [RECON],
and w = 0 leaves the gate alone.

A run begins with as many steps on the bare model, whose loss is cheap and rises fast (``start``).

Kept is, sample by sample, the iterate at which most draws were misclassified, and among those the one of highest mean
cross-entropy. Whether the defence stands is for the defence itself to say, with noise that the attacker has not seen.

Cost, against TTC with N counterattack steps: steps x eot x (3 + 2 N) units for identity and about steps x eot x (4 + 5 N) for
unrolled, 2 more with w > 0 for identity; 4 more either way where the gate is a tower of its own; and one look without
gradient, eot x (2 + 2 N), and 2 steps on the bare model, for each restart. At the defaults (N = 2, 50 steps) that is about
1510 units; PGD-50 takes 100.

Shapes: B images, C channels (or classes, in logits), H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from zsr.attacks.base import (
    AttackResult,
    BoundedAttack,
    BoundedConfig,
    Logits,
    PerSampleLoss,
    check_pixel_units,
)
from zsr.attacks.noise import derived_seeds, fill_uniform
from zsr.attacks.pgd import PGD, PGDConfig, Seen
from zsr.config.base import PixelUnits, Weight
from zsr.defenses.base import Through

Count = Annotated[int, Field(ge=1)]


class Surrogate(Protocol):
    """A defended classifier as an attacker rebuilds it: ``DefendedCLIP.surrogate`` makes one."""

    def __call__(self, image_BCHW: Tensor, noise_BCHW: Tensor, through: Through) -> tuple[Tensor, Tensor]:
        """Logits ``[B, C]`` and gate margins ``[B]``, differentiable; row i depends on image and noise i alone.

        Args:
            image_BCHW: pixels in [0, 1].
            noise_BCHW: uniform in [-1, 1), in place of the defence's own.
            through: how gradients go back through the defence.
        """

    def bare(self, image_BCHW: Tensor) -> Tensor:
        """Logits ``[B, C]`` without the defence, differentiable."""


class AdaptiveConfig(BoundedConfig):
    name: Literal["adaptive"] = "adaptive"
    step_size: PixelUnits = 1 / 510
    """Length of one step, in the units of eps."""
    steps: Annotated[int, Field(ge=0)] = 50
    restarts: Count = 1
    """Independent random starts; the best image of all is kept, per sample."""
    start: Literal["bare", "random"] = "bare"
    """From where the bare model's loss leads in as many steps, or from the random start itself."""
    eot: Count = 2
    """Draws of the defence's noise that each gradient is the mean of. Many steps of few draws, new ones each time, find more
    than few steps of many: of 16 images of zsr:emoji/val that zsr:emoji-vit has right behind TTC, 50 steps of 2 draws left
    none at 4/255, 10 steps of 10 draws left 2, and PGD-50 without knowledge of TTC 4."""
    through: Through = "unrolled"
    gate_weight: Weight = 1.0
    """Of the term that leads the image to where the defence does not act; 0 leaves it out."""

    @model_validator(mode="after")
    def _step_in_pixel_units(self) -> AdaptiveConfig:
        check_pixel_units("step_size", self.step_size, self.norm)
        return self


class Adaptive(BoundedAttack[AdaptiveConfig]):
    """Projected gradient ascent on what the defended classifier is expected to lose."""

    def __init__(self, config: AdaptiveConfig) -> None:
        super().__init__(config)
        steps = config.steps if config.start == "bare" else 0
        shared = config.model_dump(include={"norm", "eps", "step_size", "schedule"})
        self._start = PGD(PGDConfig(**shared, steps=steps))

    def attack_defended(
        self, surrogate: Surrogate, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        """Perturb images so that the defended classifier errs.

        ``success_B`` says whether most of the attacker's own draws were misclassified.

        Args:
            surrogate: of the defended classifier. Call inside ``input_gradients_only``, for both towers of the defence.
            image_BCHW: float pixels in [0, 1].
            label_B: true classes.
            seeds: one per sample (zsr/attacks/noise.py).
        """
        threat = self.threat()
        zero_grad_B = torch.zeros(len(image_BCHW), dtype=torch.bool, device=image_BCHW.device)
        if threat.eps == 0:
            return AttackResult(image_BCHW, zero_grad_B)
        best: Seen | None = None
        for restart in range(self.config.restarts):
            start_BCHW = self._start.attack_classifier(
                surrogate.bare, image_BCHW, label_B, derived_seeds(seeds, "adaptive", restart)
            ).image_BCHW
            delta_BCHW = threat.project(start_BCHW - image_BCHW, image_BCHW)
            for step in range(self.config.steps + 1):
                last = step == self.config.steps
                seen, grad_BCHW = self._look(
                    surrogate, image_BCHW, delta_BCHW, label_B, derived_seeds(seeds, "eot", restart, step), not last
                )
                best = seen if best is None else best.or_better(seen)
                if not last:
                    zero_grad_B |= (grad_BCHW == 0).flatten(1).all(1)
                    stepped_BCHW = delta_BCHW + threat.ascend(grad_BCHW, self.config.step_size)
                    delta_BCHW = threat.project(stepped_BCHW, image_BCHW)
        assert best is not None
        # image + (attacked - image) may round to just outside the box.
        return AttackResult((image_BCHW + best.delta_BCHW).clamp(0, 1), zero_grad_B, success_B=best.wrong_B > 0.5)

    def _look(
        self,
        surrogate: Surrogate,
        image_BCHW: Tensor,
        delta_BCHW: Tensor,
        label_B: Tensor,
        seeds: Sequence[int],
        with_grad: bool,
    ) -> tuple[Seen, Tensor]:
        """Means over the draws, one at a time: memory holds the graph of one."""
        config, grad_BCHW = self.config, torch.zeros_like(image_BCHW)
        wrong_B = torch.zeros(len(image_BCHW), dtype=image_BCHW.dtype, device=image_BCHW.device)
        ce_B = torch.zeros_like(wrong_B)
        for draw in range(config.eot):
            attacked_BCHW = (image_BCHW + delta_BCHW).clamp(0, 1).requires_grad_(with_grad)
            noise_BCHW = fill_uniform(image_BCHW, derived_seeds(seeds, draw))
            with torch.set_grad_enabled(with_grad):
                logits_BC, margin_B = surrogate(attacked_BCHW, noise_BCHW, config.through if with_grad else "identity")
                once_B = F.cross_entropy(logits_BC, label_B, reduction="none")
                loss_B = once_B - config.gate_weight * margin_B.relu() if config.gate_weight else once_B
            if with_grad:
                grad_BCHW += torch.autograd.grad(loss_B.sum(), attacked_BCHW)[0] / config.eot
            wrong_B += (logits_BC.detach().argmax(1) != label_B) / config.eot
            ce_B += once_B.detach() / config.eot
        return Seen(delta_BCHW, wrong_B, ce_B), grad_BCHW

    def perturb(
        self, loss: PerSampleLoss, image_BCHW: Tensor, seeds: Sequence[int], progress: float = 1.0
    ) -> AttackResult:
        raise ValueError(self._needs_defense)

    def attack_classifier(
        self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        raise ValueError(self._needs_defense)

    _needs_defense = (
        "attack.name=adaptive: attacks a model through its test-time defence and there is none; "
        "evaluate with --defense ttc, or choose pgd"
    )
