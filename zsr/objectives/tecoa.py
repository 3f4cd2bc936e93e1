"""TeCoA: text-guided contrastive adversarial training (Mao et al., ICLR 2023, arXiv 2212.07016).

    L = CE(s <v(x_a), t>, y),   x_a = argmax CE within the threat model,   t frozen

Cost: 2 units per attack step + 3; PGD-2 takes 7.

What differs from the authors' code, and why (METHODS.md 2.4, 2.5): class prompts are encoded once, not in every attack
step; the attack takes the gradient of the input alone, theirs also fills every weight's gradient; the attack runs in
fp32 or bf16 with a summed loss, not in fp16; selection never sees a test set.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F

from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext


class TecoaConfig(ObjectiveConfig):
    name: Literal["tecoa"] = "tecoa"


class Tecoa(Objective[TecoaConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {}

    def loss(self, ctx: StepContext) -> LossOutput:
        cross_entropy = F.cross_entropy(ctx.logits(ctx.adv.embed_BD), ctx.label_B)
        return LossOutput(cross_entropy, {"ce": cross_entropy})
