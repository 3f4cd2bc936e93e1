"""Attacks around the text: the attacker aims at another head than the one that judges (METHODS.md (b) 7).

    seen, superclass_of_C = craft_head(model, bank, classes, superclasses=read_superclasses("cifar100"))
    found = attack.attack_classifier(seen, image_BCHW, superclass_of_C[label_B], seeds)
    right_B = judging_head(found.image_BCHW).argmax(-1) == label_B

Two of them: the attacker drives an image out of its superclass, and the leaf classes judge; or the attacker knows other prompts
than those that judge. A model that is robust because of where its few class prompts lie, and not because of its images, shows
it here. The perturbation is crafted for the wrong head, so an accuracy under it is no lower bound, and can only be set beside
that under the plain attack.

Choose an attack that does not stop where it succeeds (pgd, cw): one that does (apgd, autoattack, square) leaves an image alone
that the attacker's own head gets wrong at once, whatever the judging head says.

Shapes: C classes, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zsr.data.suite import match_superclasses
from zsr.engine.quick_eval import ZeroShotHead
from zsr.models import RobustCLIP, TextBank

DEFAULT_TEMPLATE = "This is a photo of a {}."


def craft_head(
    model: RobustCLIP,
    bank: TextBank,
    classes: Sequence[str],
    *,
    templates: Sequence[str] | None = None,
    superclasses: Mapping[str, str] | None = None,
) -> tuple[ZeroShotHead, Tensor | None]:
    """What an attacker sees in place of the head that judges.

    Args:
        model, bank: of the head that judges.
        classes: the set's, in the order of its labels.
        templates: prompts that the attacker knows; None for "This is a photo of a {}."
        superclasses: superclass of each class, in words that go into the prompts
            (``zsr.data.suite.read_superclasses``); None to aim at the classes themselves.

    Returns:
        The head, and the label in it of each class, int64 ``[C]``; None where labels are the same.

    Raises:
        ValueError: a class has no superclass, or all have the same one; or neither templates nor superclasses were given.
    """
    if templates is None and superclasses is None:
        raise ValueError(
            "an attack around the text needs templates or superclasses of its own; without, it is a plain one"
        )
    prompts = [DEFAULT_TEMPLATE] if templates is None else templates
    if superclasses is None:
        return ZeroShotHead(model, bank, classes, prompts), None
    found = match_superclasses(classes, superclasses)
    names = list(dict.fromkeys(found))
    if len(names) < 2:
        raise ValueError(f"all classes belong to the superclass {names[0]!r}: there is nothing to mistake it for")
    head = ZeroShotHead(model, bank, names, prompts)
    return head, torch.tensor([names.index(name) for name in found], device=head.text_CD.device)
