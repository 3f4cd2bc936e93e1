"""What a test-time defence is: it maps the images that arrive to the images that are classified.

Shapes: B images, C channels, H x W pixels. Pixels are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

from torch import Tensor

from zsr.config.plugins import Plugin, PluginConfig
from zsr.config.schema import DEFENSES
from zsr.models.tower import ImageFeatures

Tower = Callable[[Tensor], ImageFeatures]
"""Images ``[B, C, H, W]`` in [0, 1] to their features, differentiable; row i depends on image i alone."""

Through = Literal["unrolled", "identity"]
"""How a gradient goes back through a defence: through every step of it, or past it as if it added a constant."""


class DefenseConfig(PluginConfig):
    """Settings of one defence."""


DefenseT = TypeVar("DefenseT", bound=DefenseConfig)


class Defense(Plugin[DefenseT]):
    """Base of all defences. Subclassing with a config registers the defence under its config's name."""

    registry = DEFENSES

    def purify(self, victim: Tower, frozen: Tower, image_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """The images ``[B, C, H, W]`` to be classified in place of those that arrived, in [0, 1], detached.

        It works inside ``torch.no_grad`` and ``torch.inference_mode``, as serving code runs. It leaves parameters,
        their gradients and the towers' modes alone.

        Args:
            victim: image tower of the model that is served.
            frozen: image tower of the pre-trained model that ``victim`` came from; the same object where ``victim`` was
                not fine-tuned, and then no pass is spent twice.
            image_BCHW: float pixels in [0, 1].
            noise_BCHW: uniform in [-1, 1), row i from a seed of sample i (zsr/attacks/noise.py). The caller draws it, so
                that a defence is a function of its inputs: any batch gives the same result, and an attack that averages
                over the randomness only has to pass other noise.
        """
        raise TypeError(f"{type(self).__name__} does not purify")

    def purify_differentiably(
        self, victim: Tower, frozen: Tower, image_BCHW: Tensor, noise_BCHW: Tensor, through: Through
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`purify` gives, with a gradient for an attacker who knows the defence, and the gate's margin.

        Call it with gradients on and an image that wants one; ``unrolled`` takes gradients of gradients of ``victim``.

        Returns:
            The purified images, and how far ``[B]`` each image is inside the region where the defence acts: positive where
            it does, zero everywhere for a defence without a gate.
        """
        raise TypeError(f"{type(self).__name__} has no differentiable form")

    def cost_units(self, own_gate: bool = False) -> int:
        """Image-encoder passes for one defended prediction, where a plain one takes 1.

        Args:
            own_gate: whether ``frozen`` is another tower than ``victim``.
        """
        raise TypeError(f"{type(self).__name__} does not say what it costs")
