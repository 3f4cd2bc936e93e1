"""Plain fine-tuning on unperturbed images: the baseline that is accurate and not robust.

    L = CE(s <v(x), t>, y)

Cost: 3 units (one pass forward, backward to the weights).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext, View


class CleanConfig(ObjectiveConfig):
    name: Literal["clean"] = "clean"


class Clean(Objective[CleanConfig]):
    @property
    def views(self) -> frozenset[View]:
        return frozenset({"clean"})

    def loss(self, ctx: StepContext) -> LossOutput:
        cross_entropy = F.cross_entropy(ctx.logits(ctx.clean.embed_BD), ctx.label_B)
        return LossOutput(cross_entropy, {"ce": cross_entropy})
