"""A model served with a test-time defence: images are purified, then encoded.

    defended = DefendedCLIP(model, "ttc", frozen=original.image)    # without frozen= if model was not fine-tuned
    head = ZeroShotHead(model, TextBank(model), ["cat", "dog"], ["a photo of a {}."])
    logits_BC = head.logits(defended.encode_image(image_BCHW).embed_BD)

Shapes: B images, C channels (or classes, in logits), D embedding width, H x W pixels. Pixels are in [0, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zsr.attacks.adaptive import Surrogate
from zsr.attacks.base import Logits
from zsr.attacks.noise import fill_uniform, sample_seeds
from zsr.config.schema import DEFENSES
from zsr.defenses.base import Defense, DefenseConfig, Through
from zsr.engine.quick_eval import ZeroShotHead
from zsr.models import ImageFeatures, ImageTower, RobustCLIP, in_precision


class DefendedCLIP:
    """A RobustCLIP behind a defence.

    This helps against attackers who do not know the defence; against one who does it is worth next to nothing
    (zsr/defenses/ttc.py has numbers).

    Args:
        model: is served; put it into eval mode first, as for any prediction.
        defense: a defence's name, for its default settings; its config; or the defence itself.
        frozen: image tower of the pre-trained model that ``model`` was fine-tuned from; None if it was not fine-tuned.
        seed: of the defence's noise.

    Raises:
        ValueError: no defence has that name, or the model's attention is random (``model.attention_drop``).
    """

    def __init__(
        self,
        model: RobustCLIP,
        defense: str | DefenseConfig | Defense[Any] = "ttc",
        frozen: ImageTower | None = None,
        seed: int = 0,
    ) -> None:
        if model.image.columns is not None:
            raise ValueError(
                f"model.attention_drop={model.image.columns.share:g}: the tower is random, and a defence that looks at how "
                "features move would look at that; use one or the other"
            )
        self.model = model
        self.defense = _build(defense)
        self.frozen = model.image if frozen is None else frozen
        self.seed = seed

    @property
    def own_gate(self) -> bool:
        """Whether the pre-trained tower is another one than the served."""
        return self.frozen is not self.model.image

    @property
    def cost_units(self) -> int:
        """Image-encoder passes of one prediction."""
        return self.defense.cost_units(self.own_gate)

    def purify(self, image_BCHW: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """The images that are classified in place of these.

        Args:
            image_BCHW: float pixels in [0, 1] at the model's image size.
            keys: what fixes each sample's noise, such as its file name. Without keys it is the image's own content,
                which has to be copied to the host for that: an image gets the same answer each time, in any batch.
        """
        seeds = sample_seeds(_content_keys(image_BCHW) if keys is None else keys, "defense", self.seed)
        noise_BCHW = fill_uniform(image_BCHW, seeds)
        return self.defense.purify(self.model.image, self.frozen, image_BCHW, noise_BCHW)

    def encode_image(self, image_BCHW: Tensor, keys: Sequence[str] | None = None) -> ImageFeatures:
        """Features of the purified images, without gradients; arguments as for :meth:`purify`."""
        with torch.no_grad():
            return self.model.encode_image(self.purify(image_BCHW, keys))

    def surrogate(self, head: ZeroShotHead) -> Surrogate:
        """The differentiable copy of this defended classifier that the ``adaptive`` attack takes.

        For the same noise it gives the predictions of the defence itself, up to rounding: through an unrolled defence the
        towers run in float32 and without fused attention, which has no gradient of its gradient.

        Args:
            head: classifies purified images; of this model.
        """

        return _Surrogate(self, head)

    def scores(self, head: ZeroShotHead, draws: int = 1, seed: int = 0) -> Logits:
        """Logits of the defended classifier, without gradients, for attacks that need nothing else, such as Square.

        The noise is the asker's own and the same for each image and each query: what such an attack compares is then a
        function of the image. It is not the noise that the defence itself draws when it judges.

        Args:
            head: classifies purified images; of this model.
            draws: of noise, over which logits are averaged; each costs what a prediction costs.
            seed: of those draws.
        """
        seeds = sample_seeds([str(draw) for draw in range(draws)], "defense scores", seed)

        @torch.no_grad()
        def mean_logits(image_BCHW: Tensor) -> Tensor:
            noise_DCHW = fill_uniform(image_BCHW[:1].expand(draws, -1, -1, -1), seeds)
            each_BC = [
                head(self.defense.purify(self.model.image, self.frozen, image_BCHW, noise_CHW.expand_as(image_BCHW)))
                for noise_CHW in noise_DCHW
            ]
            return torch.stack(each_BC).mean(0)

        return mean_logits


@dataclass(frozen=True)
class _Surrogate:
    defended: DefendedCLIP
    head: ZeroShotHead

    def __call__(self, image_BCHW: Tensor, noise_BCHW: Tensor, through: Through) -> tuple[Tensor, Tensor]:
        victim, frozen = self.defended.model.image, self.defended.frozen
        with _twice_differentiable(victim, frozen) if through == "unrolled" else nullcontext():
            purified_BCHW, margin_B = self.defended.defense.purify_differentiably(
                victim, frozen, image_BCHW, noise_BCHW, through
            )
            return self.head(purified_BCHW), margin_B

    def bare(self, image_BCHW: Tensor) -> Tensor:
        return self.head(image_BCHW)


@contextmanager
def _twice_differentiable(*towers: ImageTower) -> Iterator[None]:
    """Plain arithmetic in the towers: fused attention and compiled blocks have no gradient of their gradient."""
    compiled = any(module._compiled_call_impl is not None for tower in towers for module in tower.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(in_precision("fp32", towers))
        yield


def _build(defense: str | DefenseConfig | Defense[Any]) -> Defense[Any]:
    if isinstance(defense, Defense):
        return defense
    if isinstance(defense, DefenseConfig):
        return DEFENSES.build(defense)
    try:
        return DEFENSES.build(DEFENSES.config_class(defense).model_validate({}))
    except ValueError as error:
        raise ValueError(f"defense={defense}: {error}") from None


def _content_keys(image_BCHW: Tensor) -> list[str]:
    rows = image_BCHW.detach().float().cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows]
