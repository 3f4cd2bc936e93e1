"""One model on several sets under several attacks: the rows of ``zsr eval``.

The measurement itself is the loop's own quick evaluation (zsr/engine/quick_eval.py), with more samples and steps. The
strong attacks and result cards belong in this room too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from zsr.attacks.base import Attack
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import EvalResult, ZeroShotHead, evaluate
from zsr.eval.card import wilson_interval
from zsr.eval.defended import DefendedCLIP
from zsr.eval.oblivious import evaluate_oblivious
from zsr.models import RobustCLIP, TextBank

Progress = Callable[[str, str, int, int], None]
"""Called with (set, attack, samples done, samples to do)."""


@dataclass(frozen=True)
class Accuracy:
    """A share of ``num_samples`` in [0, 1] with its 95 % Wilson interval."""

    value: float
    num_samples: int

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.value, self.num_samples)


@dataclass(frozen=True)
class EvalRow:
    """One set, classified by the bare model or by the defended one.

    Attributes:
        chance: accuracy of guessing, 1 / classes.
        template: the prompt that made the class embeddings.
        robust: accuracy under each attack, by the attack's label.
        zero_grad_frac: share of samples without an input gradient, by the attack's label; 0 unless something is wrong.
        defense: name of the test-time defence in front of the model, which the attack does not know; None without one.
        survivors: for attacks in stages, accuracy after each stage, by the attack's label.
    """

    data: str
    chance: float
    template: str
    clean: Accuracy
    robust: Mapping[str, Accuracy]
    zero_grad_frac: Mapping[str, float]
    defense: str | None = None
    survivors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def evaluate_sets(
    model: RobustCLIP,
    sets: Sequence[ShardSet],
    attacks: Mapping[str, Attack[Any]],
    *,
    template: str | None = None,
    num_samples: int = 0,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
    defended: DefendedCLIP | None = None,
) -> list[EvalRow]:
    """Measure clean and robust zero-shot accuracy on each set.

    Args:
        attacks: by label, such as ``{"2/255": PGD(...)}``; may be empty.
        template: prompt for all sets; each set's own first one if None.
        num_samples: of each set, the head of its fixed subset order; 0 means all.
        defended: ``model`` behind a defence. Each set then gives two rows, without and with it, from one run of the attacks
            (zsr/eval/oblivious.py says what is attacked and what counts).

    Raises:
        ValueError, OSError: a set cannot be read.
    """
    bank = TextBank(model)
    measured: dict[str, Attack[Any] | None] = {**attacks} if attacks else {"clean": None}
    rows = []
    for shards in sets:
        if not shards.has_labels:
            raise ValueError(f"{shards.address}: has no labels; accuracy needs a set with classes")
        prompt = shards.templates[0] if template is None else template
        head = ZeroShotHead(model, bank, shards.classes, [prompt])
        options: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
        if defended is None:
            bare = {
                label: evaluate(head, shards, attack, progress=_named(progress, shards.address, label), **options)
                for label, attack in measured.items()
            }
        else:
            tell = None if progress is None else partial(progress, shards.address)
            both = evaluate_oblivious(head, defended, shards, measured, progress=tell, **options)
            bare = {label: results[0] for label, results in both.items()}
            behind = {label: results[1] for label, results in both.items()}
        rows.append(_row(shards, prompt, bare, None))
        if defended is not None:
            rows.append(_row(shards, prompt, behind, defended.defense.config.name))
    return rows


def _row(shards: ShardSet, prompt: str, results: Mapping[str, EvalResult], defense: str | None) -> EvalRow:
    first = next(iter(results.values()))
    return EvalRow(
        data=shards.address,
        chance=1 / first.num_classes,
        template=prompt,
        clean=Accuracy(first.clean_acc, first.num_samples),
        robust={
            label: Accuracy(result.robust_acc, result.num_samples)
            for label, result in results.items()
            if result.robust_acc is not None
        },
        zero_grad_frac={
            label: result.zero_grad_frac for label, result in results.items() if result.zero_grad_frac is not None
        },
        defense=defense,
        survivors={label: result.survivors for label, result in results.items() if result.survivors},
    )


def _named(progress: Progress | None, data: str, label: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(data, label, done, total)
