"""What attacks on a classifier maximise: cross-entropy, margin, DLR and targeted DLR, a loss per sample.

Shapes: B images, C classes; label and target ``[B]`` are class indices, all losses ``[B]``.

Sources: DLR and its targeted form, Croce & Hein, ICML 2020 (arXiv 2003.01690), equations 6 and 7; margin, Carlini & Wagner,
S&P 2017 (arXiv 1608.04644), f_6.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["ce", "dlr", "dlr-targeted", "margin"]

_TINY = 1e-12  # where the ordered logits of a denominator coincide
_NEEDS_CLASSES: dict[str, int] = {"ce": 2, "margin": 2, "dlr": 3, "dlr-targeted": 4}


def classifier_loss(name: LossName, logits_BC: Tensor, label_B: Tensor, target_B: Tensor | None = None) -> Tensor:
    """The loss of that name; ``target_B`` is for the targeted one."""
    if name == "ce":
        return F.cross_entropy(logits_BC, label_B, reduction="none")
    if name == "margin":
        return margin(logits_BC, label_B)
    if name == "dlr":
        return dlr(logits_BC, label_B)
    assert target_B is not None
    return targeted_dlr(logits_BC, label_B, target_B)


def margin(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """The best wrong class's logit less the true one's: positive where the classifier errs."""
    return _best_other(logits_BC, label_B) - _pick(logits_BC, label_B)


def dlr(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over (largest - third largest logit); needs three classes.

    Shifting or scaling all logits changes nothing, so a confident model cannot hide its gradient as it can with
    cross-entropy.
    """
    top_B3 = logits_BC.topk(3).values
    return margin(logits_BC, label_B) / (top_B3[:, 0] - top_B3[:, 2] + _TINY)


def targeted_dlr(logits_BC: Tensor, label_B: Tensor, target_B: Tensor) -> Tensor:
    """The target's logit less the true one's, over (largest - mean of third and fourth); needs four classes."""
    top_B4 = logits_BC.topk(4).values
    gap_B = _pick(logits_BC, target_B) - _pick(logits_BC, label_B)
    return gap_B / (top_B4[:, 0] - (top_B4[:, 2] + top_B4[:, 3]) / 2 + _TINY)


def likely_targets(logits_BC: Tensor, label_B: Tensor, most: int) -> Tensor:
    """The wrong classes with the highest logits, best first: ``[B, min(most, C - 1)]``."""
    others_BC = logits_BC.scatter(1, label_B[:, None], -torch.inf)
    return others_BC.topk(min(most, logits_BC.shape[1] - 1)).indices


def needs_more_classes(name: str, num_classes: int) -> bool:
    """Whether the loss is undefined for so few classes; of a loss that is not one of these, whether there is but one."""
    return num_classes < _NEEDS_CLASSES.get(name, 2)


def steps_aside(name: LossName, num_classes: int) -> bool:
    """Whether the loss is undefined for so few classes; says so in a warning (once, by Python's own rule)."""
    if not needs_more_classes(name, num_classes):
        return False
    warnings.warn(
        f"the {name} loss needs {_NEEDS_CLASSES[name]} classes and there are {num_classes}: its attack is left out",
        stacklevel=2,
    )
    return True


def _pick(logits_BC: Tensor, class_B: Tensor) -> Tensor:
    return logits_BC.gather(1, class_B[:, None]).squeeze(1)


def _best_other(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    return logits_BC.scatter(1, label_B[:, None], -torch.inf).amax(1)
