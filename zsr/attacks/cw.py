"""CW: projected gradient descent on the margin loss (f_6 of Carlini & Wagner, S&P 2017, arXiv 1608.04644).

    max over the ball of min(max_{j != y} z_j - z_y, confidence)

This is what papers on robust CLIP call CW: the loss of Carlini and Wagner inside Madry's bounded attack, not their search for
the smallest L2 perturbation. The step, the ball and the starts are PGD's (zsr/attacks/pgd.py).

Cost: PGD's and 1 unit to see what succeeded. Default confidence is that of TeCoA's code, in logits (which are 100 times a
cosine); a sample past it moves no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zsr.attacks.base import Attack, AttackResult, Logits
from zsr.attacks.losses import margin
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.attacks.threat import ThreatModel
from zsr.config.base import Weight


class CWConfig(PGDConfig):
    name: Literal["cw"] = "cw"  # type: ignore[assignment]
    confidence: Weight = 50.0
    """Lead of the wrong class, in logits, at which a sample is left alone."""


class CW(Attack[CWConfig]):
    """PGD on the margin."""

    def __init__(self, config: CWConfig) -> None:
        super().__init__(config)
        self._pgd = PGD(PGDConfig(**{**config.model_dump(exclude={"confidence"}), "name": "pgd"}))

    def threat(self, progress: float = 1.0) -> ThreatModel:
        """The ball at this point of training."""
        return self._pgd.threat(progress)

    def attack_classifier(
        self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        def capped(logits_BC: Tensor) -> Tensor:
            return margin(logits_BC, label_B).clamp(max=self.config.confidence)

        found = self._pgd.attack_logits(capped, logits, image_BCHW, label_B, seeds)
        with torch.no_grad():
            margin_B = margin(logits(found.image_BCHW), label_B)
        # Past the confidence the loss is flat by design: that is no sign of a masked gradient.
        return AttackResult(
            found.image_BCHW, found.zero_grad_B & (margin_B < self.config.confidence), success_B=margin_B > 0
        )
