"""What the official training loops do in a step, written anew for comparison; nothing but the bench uses it.

Their maths with their habits (METHODS.md 2.4, 3.6, 7.3), on open_clip's plain model:

- all class prompts are tokenised in every batch and encoded in every attack step, with a graph;
- the attack's backward pass fills the gradients of all image and text weights;
- TGA-ZSR encodes the attacked image a second time for its map and runs the frozen tower with a graph; PMG-AFT encodes the
  prompts again for the frozen model and for the clean image, and trains through both targets.

Where a habit changes values, the correct ones are taken, so that loss and attack agree with zsr's: gradients of the attack
are cleared before the outer step (theirs are scaled down by 2^16 instead), PMG-AFT's logits keep CLIP's scale and its
divergences are means over the batch. Their half precision is replaced by the bench's dtype. Two things are not alike:

- PMG-AFT's targets. Theirs are trained through, ours are constants by default; ``--set objective.detach_clean=false`` makes the
  gradients the same, at 11 passes in place of 9.
- The tower is open_clip's, batch first, where theirs is OpenAI's, sequence first: two blocks of it, forward and backward, took
  1.05 (fp32) and 1.02 (bf16) times as long, of the text tower 1.07 times. TGA-ZSR's loop is that of its paper's time: a later
  version encodes the prompts of the outer step once.

Shapes: B images, C classes, D embedding width, L tokens with the class token, S x S pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsr.attacks.threat import ThreatModel
from zsr.models import RobustCLIP

TEMPLATE = "This is a photo of a {}"
EPS = STEP_SIZE = 1 / 255
ATTACK_STEPS = 2


class OfficialStep:
    """A plain CLIP, its optimizer and what a step of any of the loops needs.

    Args:
        model: open_clip's, with plain layers; its weights are trained.
        tokenizer: prompts to token ids.
        mean, std: of the pixels.
        class_names: C of them.
        bf16: whether encoders run in autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str],
        bf16: bool = False,
        lr: float = 1e-5,
    ) -> None:
        self.model = cast(Any, model.requires_grad_(True))
        self.tokenizer, self.class_names, self.bf16 = tokenizer, class_names, bf16
        self.device = next(model.parameters()).device
        self.mean, self.std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (mean, std))
        self.optimizer = torch.optim.SGD(self.model.visual.parameters(), lr=lr, momentum=0.9)
        self.frozen: Any = None

    @classmethod
    def of(cls, plain: RobustCLIP, class_names: Sequence[str], bf16: bool = False) -> OfficialStep:
        """From a model loaded with ``fast_layers`` off."""
        image = plain.image
        return cls(
            plain.open_clip,
            plain.tokenizer,
            image.mean.flatten().tolist(),
            image.std.flatten().tolist(),
            class_names,
            bf16,
        )

    def __call__(self, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]) -> Tensor:
        """One optimizer step; returns the loss, detached."""
        tokens = self.tokenizer([TEMPLATE.format(name) for name in self.class_names]).to(self.device)
        self.optimizer.zero_grad(set_to_none=False)
        adv_BCHW = self.attack(image_BCHW, label_B, tokens, seeds)
        self.optimizer.zero_grad(set_to_none=False)
        loss = self.loss(image_BCHW, adv_BCHW, label_B, tokens)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self, image_BCHW: Tensor, adv_BCHW: Tensor, label_B: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(self.model, adv_BCHW, tokens), label_B)

    def attack(
        self, image_BCHW: Tensor, label_B: Tensor, tokens: Tensor, seeds: Sequence[int], steps: int = ATTACK_STEPS
    ) -> Tensor:
        """PGD with ``backward``: text is encoded in each step, and every weight's gradient grows."""
        delta = ThreatModel("linf", EPS).random_start(image_BCHW, seeds).requires_grad_(True)
        for _ in range(steps):
            F.cross_entropy(self.logits(self.model, image_BCHW + delta, tokens), label_B).backward()
            assert delta.grad is not None
            moved = (delta + STEP_SIZE * delta.grad.sign()).detach().clamp(-EPS, EPS)
            delta.data = (image_BCHW + moved).clamp(0, 1) - image_BCHW
            delta.grad.zero_()
        return (image_BCHW + delta).clamp(0, 1).detach()

    def logits(self, model: Any, image_BCHW: Tensor, tokens: Tensor) -> Tensor:
        """Both towers, as the official model's forward runs them."""
        embed_BD = self.embed(model, image_BCHW)
        return model.logit_scale.exp() * embed_BD @ self.text(model, tokens).T

    def embed(self, model: Any, image_BCHW: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            raw_BD = model.encode_image((image_BCHW - self.mean) / self.std)
        return F.normalize(raw_BD.float(), dim=-1)

    def text(self, model: Any, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            raw_CD = model.encode_text(tokens)
        return F.normalize(raw_CD.float(), dim=-1)


class OfficialTeCoA(OfficialStep):
    """TeCoA: everything above and nothing else."""


class OfficialPMG(OfficialStep):
    """PMG-AFT: three pairs of encodings in the outer step, all with graphs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = copy.deepcopy(self.model)

    def loss(self, image_BCHW: Tensor, adv_BCHW: Tensor, label_B: Tensor, tokens: Tensor) -> Tensor:
        adv_BC = self.logits(self.model, adv_BCHW, tokens)
        guide_BC = self.logits(self.frozen, adv_BCHW, tokens)
        clean_BC = self.logits(self.model, image_BCHW, tokens)
        log_BC = F.log_softmax(adv_BC, dim=-1)
        to_guide = F.kl_div(log_BC, guide_BC.softmax(-1), reduction="batchmean")
        to_clean = F.kl_div(log_BC, clean_BC.softmax(-1), reduction="batchmean")
        return F.cross_entropy(adv_BC, label_B) + to_guide + to_clean


class OfficialTGA(OfficialStep):
    """TGA-ZSR: the attacked image twice, the frozen tower with a graph, maps at full size."""

    map_size = 224

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.visual.output_tokens = True
        self.frozen = copy.deepcopy(self.model.visual)

    def embed(self, model: Any, image_BCHW: Tensor) -> Tensor:
        return F.normalize(self.tokens(model.visual, image_BCHW)[:, 0], dim=-1)

    def tokens(self, visual: Any, image_BCHW: Tensor) -> Tensor:
        """Projected tokens ``[B, L, D]``, the class token first."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            pooled_BD, patches_BPE = visual((image_BCHW - self.mean) / self.std)
            return torch.cat([pooled_BD[:, None], patches_BPE @ visual.proj], dim=1).float()

    def loss(self, image_BCHW: Tensor, adv_BCHW: Tensor, label_B: Tensor, tokens: Tensor) -> Tensor:
        text_CD = self.text(self.model, tokens)
        adv_BC = self.model.logit_scale.exp() * self.embed(self.model, adv_BCHW) @ text_CD.T
        adv = self.map(self.model.visual, adv_BCHW, text_CD[label_B])
        frozen = self.map(self.frozen, image_BCHW, text_CD[label_B])
        clean = self.map(self.model.visual, image_BCHW, text_CD[label_B])
        refine, constrain = ((one - frozen).flatten(1).norm(dim=1).mean() for one in (adv, clean))
        return F.cross_entropy(adv_BC, label_B) + 0.08 * refine + 0.05 * constrain

    def map(self, visual: Any, image_BCHW: Tensor, query_BD: Tensor) -> Tensor:
        """Min-max normalised attention map, resized to ``[B, 1, S, S]``; channels are divided by their norm over tokens."""
        all_BLD = self.tokens(visual, image_BCHW)
        all_BLD = all_BLD / all_BLD.norm(dim=1, keepdim=True)
        map_BP = (all_BLD[:, 1:] @ query_BD[:, :, None])[..., 0]
        low_B1, high_B1 = map_BP.amin(1, keepdim=True), map_BP.amax(1, keepdim=True)
        map_BP = (map_BP - low_B1) / (high_B1 - low_B1)
        side = round(map_BP.shape[1] ** 0.5)
        return F.interpolate(map_BP.view(-1, 1, side, side), size=self.map_size, mode="bilinear")


OFFICIAL: dict[str, type[OfficialStep]] = {"tecoa": OfficialTeCoA, "tga_zsr": OfficialTGA, "pmg_aft": OfficialPMG}
