"""Objectives on contexts made by hand, and what a formula written in plain Python floats is compared with.

A case holds nested lists: ``adv`` is the view's unit embeddings [B][D], ``adv_raw`` its embeddings before normalisation
(``adv`` itself if absent), ``adv_tokens`` its patch tokens [B][P][D], ``adv_class_token`` its projected class token [B][D];
the same for the other views. ``text`` and ``text0`` are class embeddings [C][D], ``text:NAME`` those of an extra prompt.
The reference side of a test uses these lists and ``math`` alone: loops over samples and classes, and slopes by central
differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zsr.config.schema import OBJECTIVES
from zsr.models import ImageFeatures
from zsr.objectives.base import FROZEN_VIEWS, LossOutput, Objective, StepContext

Vector = list[float]
Matrix = list[Vector]
Nested = list[Any]
Case = dict[str, Nested]


def random_rows(*shape: int, seed: int) -> Nested:
    """Nested lists of standard normal numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()


def unit_rows(num: int, width: int, seed: int) -> Matrix:
    """Rows of length one."""
    return [[value / math.sqrt(dot(row, row)) for value in row] for row in random_rows(num, width, seed=seed)]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(values: Vector) -> Vector:
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    return [value / math.fsum(exponentials) for value in exponentials]


class Bench:
    """One objective with leaves for everything it may read.

    Args:
        name, settings: of the objective.
        case: the numbers; see the module.
        label: class of each sample.
        scale: factor on cosines.
        twins: ordered pairs of classes with the same prompt.
        progress: of training.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        case: Case,
        label: list[int],
        *,
        scale: float,
        twins: frozenset[tuple[int, int]] = frozenset(),
        progress: float = 0.0,
    ) -> None:
        self.objective: Objective[Any] = OBJECTIVES.build(
            OBJECTIVES.config_class(name).model_validate({"name": name, **settings})
        )
        constant = (*FROZEN_VIEWS, "start", "text0", "text:")  # the engine makes these without a graph
        self.leaves = {
            key: torch.tensor(value, dtype=torch.float64, requires_grad=not key.startswith(constant))
            for key, value in case.items()
        }
        duplicate_CC = torch.zeros(len(case["text"]), len(case["text"]), dtype=torch.bool)
        for i, j in twins:
            duplicate_CC[i, j] = True
        self.ctx = StepContext(
            label_B=torch.tensor(label),
            scale=torch.tensor(scale, dtype=torch.float64),
            text_CD=self.leaves["text"],
            text0_CD=self.leaves["text0"],
            duplicate_CC=duplicate_CC,
            make_view=self.features,
            progress=progress,
            extra_text_CD={key.removeprefix("text:"): x for key, x in self.leaves.items() if key.startswith("text:")},
        )

    def features(self, view: str) -> ImageFeatures:
        """The view made of its leaves."""
        leaves = self.leaves
        made = {"tokens_BPD": leaves.get(f"{view}_tokens"), "class_token_BD": leaves.get(f"{view}_class_token")}
        given = {key: value for key, value in made.items() if value is not None}
        return ImageFeatures(leaves[view], leaves.get(f"{view}_raw", leaves[view]), **given)

    def loss(self) -> tuple[float, dict[str, float], dict[str, Nested]]:
        """Loss, terms, and the gradient of every leaf that is trained (zeros where none arrives)."""
        output: LossOutput = self.objective.loss(self.ctx)
        output.total.backward()
        return output.total.item(), {name: term.item() for name, term in output.terms.items()}, self._gradients()

    def attack_loss(self, view: str = "adv") -> tuple[Vector, dict[str, Nested]]:
        """The attack's loss per sample, and the gradient of its sum."""
        loss_B: Tensor = self.objective.attack_loss(self.ctx, self.features(view))
        loss_B.sum().backward()
        return loss_B.tolist(), self._gradients()

    def _gradients(self) -> dict[str, Nested]:
        trained = {name: x for name, x in self.leaves.items() if x.requires_grad}
        return {name: (torch.zeros_like(x) if x.grad is None else x.grad).tolist() for name, x in trained.items()}


def slopes(function: Callable[[Any], float], at: Nested, h: float = 4e-3) -> Nested:
    """Gradient of ``function`` at nested lists: central differences, extrapolated twice (Romberg), error of order h^6."""

    def difference(place: tuple[int, ...], step: float) -> float:
        ahead, behind = (function(_moved(at, place, shift)) for shift in (step, -step))
        return (ahead - behind) / (2 * step)

    def slope(place: tuple[int, ...]) -> float:
        wide, half, quarter = (difference(place, h / k) for k in (1, 2, 4))
        first, second = (4 * half - wide) / 3, (4 * quarter - half) / 3
        return (16 * second - first) / 15

    return _mapped(at, slope)


def assert_close(found: Nested, expected: Nested, tolerance: float = 1e-9) -> None:
    """Largest difference of two nested lists of one shape."""
    pairs = list(zip(_flat(found), _flat(expected), strict=True))
    assert pairs
    worst = max(abs(a - b) for a, b in pairs)
    assert worst < tolerance, f"they differ by {worst:.2e}"


def assert_zero(nested: Nested) -> None:
    assert all(value == 0 for value in _flat(nested))


def _flat(nested: Any) -> Iterator[float]:
    if isinstance(nested, list):
        for part in nested:
            yield from _flat(part)
    else:
        yield nested


def _mapped(nested: Any, slope: Callable[[tuple[int, ...]], float], place: tuple[int, ...] = ()) -> Any:
    if isinstance(nested, list):
        return [_mapped(part, slope, (*place, i)) for i, part in enumerate(nested)]
    return slope(place)


def _moved(nested: Any, place: tuple[int, ...], shift: float) -> Any:
    if not place:
        return nested + shift
    return [_moved(part, place[1:], shift) if i == place[0] else part for i, part in enumerate(nested)]
