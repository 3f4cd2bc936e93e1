"""What an objective is, and what a step hands to it.

Shapes: B images, C classes, D embedding width, P patches, H x W pixels.

An objective reads *views*: what an encoder makes of one version of the batch. Each view is one forward pass, made the
first time it is read and at most once a step. One unit of cost is one such pass; a backward pass to the input costs one
unit, to the weights one more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zsr.config.plugins import Plugin, PluginConfig
from zsr.config.schema import OBJECTIVES
from zsr.models.tower import ImageFeatures

View = Literal["adv", "clean", "frozen_adv", "frozen_clean"]
"""``adv``/``clean``: the model on the attacked/original image; ``frozen_*``: the pre-trained image tower on the same."""


@dataclass
class StepContext:
    """Everything an objective may read in one step.

    Attributes:
        label_B: class indices.
        scale: factor on cosines, scalar tensor (100 for OpenAI's models).
        text_CD: unit class embeddings as the model has them now; carry a gradient where text is tuned.
        text0_CD: the same before any tuning; constant.
        duplicate_CC: True where two different classes have the same prompt, so that neither can be told from the other.
        progress: of training, in [0, 1].
    """

    label_B: Tensor
    scale: Tensor
    text_CD: Tensor
    text0_CD: Tensor
    duplicate_CC: Tensor
    make_view: Callable[[View], ImageFeatures]
    progress: float = 0.0
    _views: dict[View, ImageFeatures] = field(default_factory=dict)

    @property
    def adv(self) -> ImageFeatures:
        return self._view("adv")

    @property
    def clean(self) -> ImageFeatures:
        return self._view("clean")

    @property
    def frozen_adv(self) -> ImageFeatures:
        return self._view("frozen_adv")

    @property
    def frozen_clean(self) -> ImageFeatures:
        return self._view("frozen_clean")

    def logits(self, embed_BD: Tensor, text_CD: Tensor | None = None) -> Tensor:
        """Zero-shot logits ``scale * cosine``, ``[B, C]``; text is a constant here unless given."""
        return self.scale * embed_BD @ (self.text_CD.detach() if text_CD is None else text_CD).T

    def _view(self, name: View) -> ImageFeatures:
        if name not in self._views:
            self._views[name] = self.make_view(name)
        return self._views[name]


@dataclass(frozen=True)
class LossOutput:
    """A step's loss.

    Attributes:
        total: scalar that is minimised, the explicit weighted sum.
        terms: named, unweighted parts for the log.
    """

    total: Tensor
    terms: Mapping[str, Tensor]


class ObjectiveConfig(PluginConfig):
    """Settings of one objective; call weights of extra terms ``weight_<term>``."""


ObjectiveT = TypeVar("ObjectiveT", bound=ObjectiveConfig)


class Objective(Plugin[ObjectiveT]):
    """Base of all objectives. Subclassing with a config registers the objective under its config's name.

    Attributes:
        needs_tokens: whether views carry projected patch tokens.
        tecoa_settings: settings at which the objective equals TeCoA exactly, or None if there are none; the free tests
            check it.
    """

    registry = OBJECTIVES
    needs_tokens: ClassVar[bool] = False
    tecoa_settings: ClassVar[dict[str, float] | None] = None

    @property
    def views(self) -> frozenset[View]:
        """The views that :meth:`loss` reads with these settings; the engine makes no others."""
        return frozenset({"adv"})

    @property
    def tunes_text(self) -> bool:
        """Whether the text tower's last projection is trained."""
        return False

    @property
    def needs_attack(self) -> bool:
        return bool(self.views & {"adv", "frozen_adv"})

    def cost_units(self, attack_steps: int) -> int:
        """Image-encoder passes of one step: two per attack step, three per trained view, one per frozen view."""
        trained = self.views & {"adv", "clean"}
        attack = 2 * attack_steps if self.needs_attack else 0
        return attack + 3 * len(trained) + len(self.views - trained)

    def attack_loss(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        """What the training attack maximises, per sample ``[B]``; plain cross-entropy, as the evaluation's attack."""
        return F.cross_entropy(ctx.logits(features.embed_BD), ctx.label_B, reduction="none")

    def loss(self, ctx: StepContext) -> LossOutput:
        """What training minimises."""
        raise TypeError(f"{type(self).__name__} has no loss")


def kl_divergence(target_logits_BC: Tensor, logits_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * mean_B KL(softmax(target / T) || softmax(logits / T))``; the target is a constant."""
    target = F.log_softmax(target_logits_BC.detach() / temperature, dim=-1)
    log_prob = F.log_softmax(logits_BC / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_prob, target, reduction="batchmean", log_target=True)


def pairs_of_different_classes(duplicate_CC: Tensor) -> Tensor:
    """Mask ``[C, C]`` of ordered pairs i != j whose prompts differ."""
    return ~duplicate_CC & ~torch.eye(len(duplicate_CC), dtype=torch.bool, device=duplicate_CC.device)
