"""What an attack is: it maximises a per-sample loss over the perturbations that a threat model allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from zsr.config.plugins import Plugin, PluginConfig
from zsr.config.schema import ATTACKS

PerSampleLoss = Callable[[Tensor], Tensor]
"""Images ``[B, C, H, W]`` in [0, 1] to losses ``[B]``, differentiable; row i depends on image i alone."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
        image_BCHW: perturbed images in [0, 1], detached.
        zero_grad_B: whether a sample's input gradient was ever exactly zero everywhere: the sign that an attack
            underflows or that a model masks its gradient.
    """

    image_BCHW: Tensor
    zero_grad_B: Tensor


class AttackConfig(PluginConfig):
    """Settings of one attack."""


AttackT = TypeVar("AttackT", bound=AttackConfig)


class Attack(Plugin[AttackT]):
    """Base of all attacks. Subclassing with a config registers the attack under its config's name."""

    registry = ATTACKS

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
        raise TypeError(f"{type(self).__name__} does not perturb")


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
