"""Who is attacked and who judges: two things, since an attack may not know all that is served.

Shapes: B images, C channels (or classes, in logits), D embedding width, H x W pixels. Pixels are in [0, 1], at the size at
which epsilon applies; the classifier enlarges them to what the model reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from zsr.attacks.base import Attack, AttackResult
from zsr.eval.card import Knowledge
from zsr.eval.defended import DefendedCLIP
from zsr.models import ImageTower, RobustCLIP

BARE, DEFENDED = "bare", "defended"


class Head(Protocol):
    """Unit class embeddings on top of a model (zsr.engine.quick_eval.ZeroShotHead)."""

    model: RobustCLIP

    def __call__(self, image_BCHW: Tensor) -> Tensor: ...

    def logits(self, embed_BD: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Served:
    """A classifier as it is served, at the attacked resolution: bare, or behind a defence."""

    head: Any
    defended: DefendedCLIP | None = None

    def __call__(self, image_BCHW: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """Logits ``[B, classes]``, differentiable without a defence."""
        image_BCHW = enlarge(image_BCHW, self.head.model.image_size)
        if self.defended is None:
            logits_BC: Tensor = self.head(image_BCHW)
            return logits_BC
        behind_BC: Tensor = self.head.logits(self.defended.encode_image(image_BCHW, keys).embed_BD)
        return behind_BC


@dataclass(frozen=True)
class Target:
    """What an attack sees, and the classifiers that judge what it found.

    Attributes:
        seen: the classifier that the attack sees, never behind a defence.
        judges: by name, the attack's knowledge of each in ``knowledge``. What any of them gets right is attacked.
        surrogate: for an attack that knows the defence: its differentiable stand-in.
        label_map: [classes] for an attack on other classes than those that judge: the class it attacks in place of each.
        crafted_on: which texts ``seen`` has, in words.
    """

    seen: Served
    judges: Mapping[str, Served]
    knowledge: Mapping[str, Knowledge]
    surrogate: Any = None
    label_map: Tensor | None = None
    crafted_on: str = "served"

    def attack(self, attack: Attack[Any], image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]) -> AttackResult:
        """Run an attack; call inside ``input_gradients_only``."""
        if self.surrogate is not None:
            adaptive: Any = attack
            found: AttackResult = adaptive.attack_defended(self.surrogate, image_BCHW, label_B, seeds)
            return found
        return attack.attack_classifier(self.seen, image_BCHW, self._aimed(label_B), seeds)

    def fooled(self, image_BCHW: Tensor, label_B: Tensor) -> Tensor:
        """bool [B]: whether the classifier that is attacked errs, by its own classes."""
        return self.seen(image_BCHW).argmax(1) != self._aimed(label_B)

    def _aimed(self, label_B: Tensor) -> Tensor:
        return label_B if self.label_map is None else self.label_map.to(label_B.device)[label_B]

    @property
    def towers(self) -> list[ImageTower]:
        """Every image tower that attack and judges run, once."""
        towers = {id(self.seen.head.model.image): self.seen.head.model.image}
        for judge in self.judges.values():
            own = [judge.head.model.image, *([judge.defended.frozen] if judge.defended else [])]
            towers |= {id(tower): tower for tower in own}
        return list(towers.values())


def plain_target(head: Any, defended: DefendedCLIP | None = None) -> Target:
    """The bare model is attacked; it judges and, if there is one, the defence that the attack does not know."""
    seen = Served(head)
    if defended is None:
        return Target(seen, {BARE: seen}, {BARE: "white-box"})
    behind = Served(head, defended)
    return Target(seen, {BARE: seen, DEFENDED: behind}, {BARE: "white-box", DEFENDED: "oblivious"})


def adaptive_target(head: Any, defended: DefendedCLIP, pixels: int) -> Target:
    """The defence's own stand-in is attacked, the defence itself judges.

    Raises:
        ValueError: epsilon applies at another size than the model reads; the defence's noise belongs to that one.
    """
    if pixels != head.model.image_size:
        raise ValueError(
            f"--attack adaptive: epsilon applies at {pixels} pixels here and the model reads {head.model.image_size}; "
            "the attack on a defence needs one size for both, so choose a suite whose attack_resolution is model"
        )
    behind = Served(head, defended)
    return Target(Served(head), {DEFENDED: behind}, {DEFENDED: "adaptive"}, surrogate=defended.surrogate(head))


def crafted_target(
    head: Any, crafted: Any, label_map: Tensor | None, words: str, defended: DefendedCLIP | None = None
) -> Target:
    """The bare model under other texts is attacked; who judges is as for the plain attack.

    Args:
        crafted, label_map: from ``zsr.eval.crafted.craft_head``.
        words: which texts those are.
    """
    plain = plain_target(head, defended)
    return Target(Served(crafted), plain.judges, plain.knowledge, label_map=label_map, crafted_on=words)


def enlarge(image_BCHW: Tensor, size: int) -> Tensor:
    """Square images at the size that the model reads; differentiable, bicubic without antialiasing (METHODS.md a.4)."""
    if image_BCHW.shape[-1] == size:
        return image_BCHW
    return F.interpolate(image_BCHW, size=(size, size), mode="bicubic", align_corners=False, antialias=False)
