"""What an objective is, and what a step hands to it.

Shapes: B images, C classes, D embedding width, P patches, H x W pixels.

An objective reads *views*: what an encoder makes of one version of the batch. Each view is one forward pass, made the
first time it is read and at most once a step. One unit of cost is one such pass; a backward pass to the input costs one
unit, to the weights one more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zsr.config.plugins import Plugin, PluginConfig
from zsr.config.schema import OBJECTIVES
from zsr.models import ImageFeatures, RobustCLIP

View = Literal["adv", "clean", "clean_fixed", "extra", "start", "frozen_adv", "frozen_clean"]
"""``adv``/``clean``: the model on the attacked/original image; ``extra``: the model on an image that the objective makes of
the original (:meth:`Objective.extra_image`); ``frozen_*``: the pre-trained image tower. ``clean_fixed`` is ``clean`` without
a graph, for targets, at one unit instead of three. ``start`` is the model on the attack's starting point, a constant that
the attack computes anyway and that costs nothing."""

TRAINED_VIEWS: frozenset[View] = frozenset({"adv", "clean", "extra"})
FROZEN_VIEWS: frozenset[View] = frozenset({"frozen_adv", "frozen_clean"})
CONSTANT_VIEWS: frozenset[View] = FROZEN_VIEWS | {"clean_fixed"}
"""Views of one forward pass and no backward pass."""

PerSample = Callable[[ImageFeatures, Tensor], Tensor]
"""The frozen model's features of some clean images and their labels ``[B]`` to one row for each image, ``[B, ...]``."""


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
        extra_text_CD: constant unit class embeddings of :attr:`Objective.extra_templates`, by their names.
        global_batch: samples in the step over all workers; None for those at hand.
        constants: what :meth:`constant` keeps; the engine hands the same mapping to every step.
    """

    label_B: Tensor
    scale: Tensor
    text_CD: Tensor
    text0_CD: Tensor
    duplicate_CC: Tensor
    make_view: Callable[[View], ImageFeatures]
    progress: float = 0.0
    extra_text_CD: Mapping[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    global_batch: int | None = None
    cached_per_sample: Callable[[str, PerSample], Tensor] | None = None
    _views: dict[View, ImageFeatures] = field(default_factory=dict)
    _rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def adv(self) -> ImageFeatures:
        return self._view("adv")

    @property
    def clean(self) -> ImageFeatures:
        return self._view("clean")

    @property
    def clean_fixed(self) -> ImageFeatures:
        return self._view("clean_fixed")

    @property
    def extra(self) -> ImageFeatures:
        return self._view("extra")

    @property
    def start(self) -> ImageFeatures:
        return self._view("start")

    @property
    def frozen_adv(self) -> ImageFeatures:
        return self._view("frozen_adv")

    @property
    def frozen_clean(self) -> ImageFeatures:
        return self._view("frozen_clean")

    @property
    def frozen_clean_embed_BD(self) -> Tensor:
        """The frozen model's unit embeddings of the clean images, kept by sample where the run keeps them."""
        return self.per_sample("embed", lambda features, _: features.embed_BD)

    def per_sample(self, name: str, of: PerSample) -> Tensor:
        """A constant of each sample, ``[B, ...]``: ``of(frozen clean features, labels)``.

        Prefer it to ``frozen_clean``: with ``train.cache_frozen`` the rows are kept by sample key under ``name``, and from
        the second epoch on neither ``of`` nor the frozen tower runs.
        """
        if self.cached_per_sample is None:
            return of(self.frozen_clean, self.label_B)
        if name not in self._rows:  # an attack asks in each of its steps
            self._rows[name] = self.cached_per_sample(name, of)
        return self._rows[name]

    def constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A constant of the run, made at the first step that asks for it."""
        if name not in self.constants:
            self.constants[name] = make().detach()
        return self.constants[name]

    def logits(self, embed_BD: Tensor, text_CD: Tensor | None = None) -> Tensor:
        """Zero-shot logits ``scale * cosine``, ``[B, C]``; text is a constant here unless given."""
        return self.scale * embed_BD @ (self.text_CD.detach() if text_CD is None else text_CD).T

    def keep_start(self, features: ImageFeatures) -> None:
        """Take the attack's first pass as view ``start``; later passes change nothing."""
        if "start" not in self._views:
            self._views["start"] = ImageFeatures(features.embed_BD.detach(), features.raw_BD.detach())

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
        uses_classes: whether the loss or the attack reads labels or class embeddings; without, the training set needs neither
            labels nor class names.
        tecoa_settings: settings at which the objective equals TeCoA exactly, or None if there are none; the free tests
            check it.
    """

    registry = OBJECTIVES
    uses_classes: ClassVar[bool] = True
    tecoa_settings: ClassVar[dict[str, Any] | None] = None

    @property
    def views(self) -> frozenset[View]:
        """The views that :meth:`loss` reads with these settings; the engine makes no others."""
        return frozenset({"adv"})

    @property
    def needs_tokens(self) -> bool:
        """Whether views carry projected patch tokens with these settings; the attack's own passes never do."""
        return False

    @property
    def attack_views(self) -> frozenset[View]:
        """Trained views that :meth:`attack_loss` reads; made, with their graph, before the attack. Frozen ones need no
        mention."""
        return frozenset()

    @property
    def tunes_text(self) -> bool:
        """Whether the text tower's last projection is trained."""
        return False

    @property
    def expands_text(self) -> bool:
        """Whether class embeddings are spread out by LAAT's expansion (zsr/models/anchors.py), here and in evaluation."""
        return False

    @property
    def extra_templates(self) -> Mapping[str, str]:
        """Further prompts with ``{}`` for the class name, by a name of the objective's choice."""
        return {}

    @property
    def needs_attack(self) -> bool:
        return bool(self.views & {"adv", "start", "frozen_adv"})

    def check(self, attack: PluginConfig, model: RobustCLIP) -> None:
        """Refuse, before training starts, settings that cannot work with this attack or model.

        Raises:
            ValueError: with the setting, its value and the way out.
        """

    def cost_units(self, attack_steps: int) -> int:
        """Image-encoder passes of one step: two per attack step, three per trained view, one per constant view.

        View ``start`` is free: the attack's first step has made it. An attack without a step has not.
        """
        attack = 2 * attack_steps if self.needs_attack else 0
        attack += "start" in self.views and attack_steps == 0
        return attack + 3 * len(self.views & TRAINED_VIEWS) + len(self.views & CONSTANT_VIEWS)

    def extra_image(self, image_BCHW: Tensor) -> Tensor:
        """The image of view ``extra``: pixels in [0, 1] to pixels in [0, 1], same shape."""
        raise TypeError(f"{type(self).__name__} reads the view 'extra' without making its image")

    def attack_loss(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        """What the training attack maximises, per sample ``[B]``; plain cross-entropy, as the evaluation's attack."""
        return F.cross_entropy(ctx.logits(features.embed_BD), ctx.label_B, reduction="none")

    def loss(self, ctx: StepContext) -> LossOutput:
        """What training minimises."""
        raise TypeError(f"{type(self).__name__} has no loss")


def weighted_sum(weights: Mapping[str, float], terms: Mapping[str, Tensor]) -> Tensor:
    """``sum_i weights[i] * terms[i]`` over the terms, in their order."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def kl_per_sample(first_logits_BC: Tensor, second_logits_BC: Tensor) -> Tensor:
    """``KL(softmax(first) || softmax(second))`` of each row, ``[B]``, with the gradient of both."""
    first_BC, second_BC = first_logits_BC.log_softmax(-1), second_logits_BC.log_softmax(-1)
    return F.kl_div(second_BC, first_BC, reduction="none", log_target=True).sum(-1)


def kl_divergence(target_logits_BC: Tensor, logits_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * mean_B KL(softmax(target / T) || softmax(logits / T))``; the target is a constant."""
    divergence_B = kl_per_sample(target_logits_BC.detach() / temperature, logits_BC / temperature)
    return temperature**2 * divergence_B.mean()


def pairs_of_different_classes(duplicate_CC: Tensor) -> Tensor:
    """Mask ``[C, C]`` of ordered pairs i != j whose prompts differ."""
    return ~duplicate_CC & ~torch.eye(len(duplicate_CC), dtype=torch.bool, device=duplicate_CC.device)
