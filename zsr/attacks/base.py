"""What an attack is: it maximises a per-sample loss over the perturbations that a threat model allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from zsr.attacks.schedules import ConstantConfig, Schedule
from zsr.attacks.threat import Norm, ThreatModel
from zsr.config.base import PixelUnits
from zsr.config.plugins import Plugin, PluginConfig, PluginField
from zsr.config.schema import ATTACKS, SCHEDULES

PerSampleLoss = Callable[[Tensor], Tensor]
"""Images ``[B, C, H, W]`` in [0, 1] to losses ``[B]``, differentiable; row i depends on image i alone."""

Logits = Callable[[Tensor], Tensor]
"""Images ``[B, C, H, W]`` in [0, 1], any B, to logits ``[B, classes]``, differentiable; row i depends on image i alone."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
        image_BCHW: perturbed images in [0, 1], detached.
        zero_grad_B: whether a sample's input gradient was ever exactly zero everywhere: the sign that an attack
            underflows or that a model masks its gradient.
        success_B: whether the attack saw its image classified wrong; None if it did not look.
        stage_B: for an attack in stages, the index of the one that succeeded (an image that is wrong without an attack
            counts for the first), or their number where none did.
    """

    image_BCHW: Tensor
    zero_grad_B: Tensor
    success_B: Tensor | None = None
    stage_B: Tensor | None = None


class AttackConfig(PluginConfig):
    """Settings of one attack."""

    stops_early: ClassVar[bool] = False
    """Whether it is done with an image that the classifier it sees gets wrong, however little, or has wrong from the start."""


AttackT = TypeVar("AttackT", bound=AttackConfig)


class Attack(Plugin[AttackT]):
    """Base of all attacks. Subclassing with a config registers the attack under its config's name."""

    registry = ATTACKS
    rows: int = 0
    """Most images that a call of the classifier may hold. With few samples left an attack of several targets or restarts
    tries as many at once as fit; 0 tries one after the other. The results are the same."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the attacks that this one runs in turn; empty for a single attack."""
        return ()

    @property
    def parts(self) -> tuple[Attack[Any], ...]:
        """The attacks behind :attr:`stages`; this one alone for a single attack."""
        return (self,)

    def perturb(
        self, loss: PerSampleLoss, image_BCHW: Tensor, seeds: Sequence[int], progress: float = 1.0
    ) -> AttackResult:
        """Perturb images so that ``loss`` rises.

        Args:
            loss: maximised; see :data:`PerSampleLoss`. Call inside :func:`input_gradients_only`.
            image_BCHW: float pixels in [0, 1].
            seeds: one per sample (zsr/attacks/noise.py).
            progress: of training, in [0, 1], for the epsilon schedule; evaluation leaves it at 1.
        """
        raise ValueError(
            f"attack.name={self.config.name}: needs the logits of a classifier and cannot maximise a training loss; "
            "train with pgd, and evaluate with this"
        )

    def attack_classifier(
        self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        """Perturb images so that a classifier errs: what evaluation calls.

        This default maximises cross-entropy. Attacks with losses of their own, or that stop where they succeed, replace it.

        Args:
            logits: see :data:`Logits`. Call inside :func:`input_gradients_only`.
            image_BCHW: float pixels in [0, 1].
            label_B: true classes.
            seeds: one per sample (zsr/attacks/noise.py).
        """
        return self.perturb(lambda x: F.cross_entropy(logits(x), label_B, reduction="none"), image_BCHW, seeds)


class BoundedConfig(AttackConfig):
    """Settings of an attack that stays in a ball around the image."""

    norm: Norm = "linf"
    eps: PixelUnits = 1 / 255
    """Largest perturbation; pixels span [0, 1], so write 4/255."""
    schedule: Annotated[PluginConfig, PluginField(SCHEDULES)] = ConstantConfig()
    """How eps moves over training; evaluation takes its end."""

    @model_validator(mode="after")
    def _eps_in_pixel_units(self) -> BoundedConfig:
        check_pixel_units("eps", self.eps, self.norm)
        return self


BoundedT = TypeVar("BoundedT", bound=BoundedConfig)


class BoundedAttack(Attack[BoundedT]):
    """Base of attacks that stay in a ball around the image."""

    def __init__(self, config: BoundedT) -> None:
        super().__init__(config)
        self.schedule: Schedule = SCHEDULES.build(config.schedule)  # type: ignore[type-arg]

    def threat(self, progress: float = 1.0) -> ThreatModel:
        """The ball at this point of training."""
        return ThreatModel(self.config.norm, self.config.eps * self.schedule.factor(progress))


def check_pixel_units(setting: str, value: float, norm: Norm) -> None:
    """Reject an L-inf length of more than the pixel range, which was meant in grey levels.

    Raises:
        ValueError: it is; the sentence says how to write it.
    """
    if norm == "linf" and value > 1:
        raise ValueError(
            f"{setting}={value:g} is more than the whole pixel range [0, 1]; write {value:g}/255 for {value:g} grey levels"
        )


@contextmanager
def input_gradients_only(*modules: nn.Module) -> Iterator[None]:
    """Freeze parameters and switch to eval mode for the time of an attack; put back what was there.

    With frozen parameters the backward pass computes the input's gradient alone, a third of the work less, and leaves
    every parameter's ``.grad`` untouched.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    modes = [(child, child.training) for module in modules for child in module.modules()]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in modules:
            module.eval()
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for child, training in modes:
            child.training = training
