"""The one measurement of evaluation: clean predictions, then an attack, stage by stage over the whole set.

A stage gets the samples that are still standing after the stages before it, in full batches, and no others. Each finished
batch is a line of a ledger; what is in the ledger is not done again. Who runs the batches does not matter to the verdicts: this
process, or the workers of zsr/launch/evaluate.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from zsr.attacks.base import Attack
from zsr.data.pipeline import Batch
from zsr.eval.card import Share, wilson_interval
from zsr.eval.ledger import CLEAN, Ledger, Line
from zsr.eval.probes import drawn
from zsr.eval.scene import Answer, Request, Scene
from zsr.eval.shares import share_of


class Crew(Protocol):
    """Whoever does the batches."""

    def run(self, scene: Scene, requests: Iterable[Request]) -> Iterator[Answer]:
        """The answers, in any order."""
        ...


class LocalCrew:
    """This process, one batch after the other. While one is done, a thread reads and decodes the next."""

    def run(self, scene: Scene, requests: Iterable[Request]) -> Iterator[Answer]:
        ahead: deque[tuple[Request, Future[Batch]]] = deque()
        with ThreadPoolExecutor(1) as reader:
            for request in requests:
                ahead.append((request, reader.submit(scene.images.batch, request.ids)))
                if len(ahead) > 1:
                    due, batch = ahead.popleft()
                    yield scene.do(due, batch.result())
            for due, batch in ahead:
                yield scene.do(due, batch.result())


@dataclass(frozen=True)
class Moment:
    """How far a measurement is, after each batch.

    Attributes:
        stage: ``clean``, or the attack's name or stage.
        done, total: samples of the stage.
        over: how many of those done the first judge has wrong.
        entered, samples: samples that entered the stage, of all that are measured.
    """

    stage: str
    done: int
    total: int
    over: int
    entered: int
    samples: int

    @property
    def so_far(self) -> Share:
        """Accuracy so far: of what the stage has seen, the share still standing, scaled to the whole set.

        What did not enter was as good as seen: the interval is that of the part of the whole set which these samples stand
        for, so that at the stage's end it is the table's.
        """
        done = max(self.done, 1)
        standing = done - self.over if self.done else 1
        share = standing / done * self.entered / self.samples
        low, high = wilson_interval(share, done * self.samples / max(self.entered, 1))
        return Share(count=standing, total=done, value=share, low=low, high=high)


Tell = Callable[[Moment], None]


@dataclass(frozen=True)
class Clean:
    """Predictions without an attack, int64 [samples] by judge, and the lines they come from."""

    pred: Mapping[str, np.ndarray]
    lines: Mapping[str, Sequence[Line]]


@dataclass(frozen=True)
class Verdicts:
    """What an attack left.

    Attributes:
        attacked: bool [samples]: right without the attack, for one of the judges at least.
        pred: int64 [samples] by judge: what it sees on the attacked image; -1 where nothing was attacked.
        stage: int64 [samples]: the stage that was done with the sample; the number of stages where none was.
        zero_grad: bool [samples]: whether a gradient was ever all zero.
        lines: of the ledger.
    """

    attacked: np.ndarray
    pred: Mapping[str, np.ndarray]
    stage: np.ndarray
    zero_grad: np.ndarray
    lines: Sequence[Line]


def classify_clean(
    scene: Scene,
    ledgers: Mapping[str, Ledger],
    *,
    batch_size: int = 128,
    crew: Crew | None = None,
    tell: Tell | None = None,
) -> Clean:
    """Classify every sample as it is.

    Args:
        ledgers: one for each judge, by its name; what is there is not done again.

    Raises:
        ValueError, OSError: the set cannot be read.
    """
    ids = scene.images.ids
    done = {name: {sample for line in ledger.lines for sample in line.ids} for name, ledger in ledgers.items()}
    todo: dict[tuple[str, ...], list[int]] = {}
    for sample in ids.tolist():
        judges = tuple(name for name in ledgers if sample not in done[name])
        if judges:
            todo.setdefault(judges, []).append(sample)
    requests = [Request(CLEAN, batch, judges) for judges, rows in todo.items() for batch in _batches(rows, batch_size)]
    label = dict(zip(ids.tolist(), scene.images.label.tolist(), strict=True))
    seen = wrong = 0
    for answer in (crew or LocalCrew()).run(scene, requests):
        line = answer.line
        for name in line.pred:
            ledgers[name].append(_only(line, name, _shares_of_cost(scene, line)))
        seen += len(line.ids)
        first = next(iter(line.pred.values()))
        wrong += sum(label[sample] != seen_as for sample, seen_as in zip(line.ids, first, strict=True))
        if tell is not None:
            total = sum(len(request.ids) for request in requests)
            tell(Moment("clean", seen, total, wrong, len(ids), len(ids)))
    pred = {name: _gather(ids, ledger.lines, name) for name, ledger in ledgers.items()}
    return Clean(pred, {name: ledger.lines for name, ledger in ledgers.items()})


def run_attack(
    scene: Scene,
    attack: Attack[Any],
    clean: Clean,
    ledger: Ledger,
    *,
    batch_size: int = 128,
    crew: Crew | None = None,
    tell: Tell | None = None,
    keep: Callable[[Line, Mapping[int, np.ndarray]], None] | None = None,
    num_keep: int = 0,
) -> Verdicts:
    """Attack what is right, stage by stage.

    Args:
        clean: of the same scene; its judges are those of the attack.
        keep: gets the attacked images of ``num_keep`` samples, before their line is in the ledger.

    Raises:
        ValueError, OSError: the set cannot be read.
    """
    ids, label = scene.images.ids, scene.images.label
    judges = tuple(clean.pred)
    right = {name: frozenset(ids[pred == label].tolist()) for name, pred in clean.pred.items()}
    standing = sorted(frozenset().union(*right.values()))
    order = drawn([scene.images.keys[sample] for sample in standing])
    wanted = frozenset(standing[row] for row in order[:num_keep])
    attacked = np.isin(ids, standing)
    blind: set[int] = set()
    for stage, part in enumerate(attack.parts):
        part.rows = batch_size
        lines = [line for line in ledger.lines if line.stage == stage]
        done = {sample for line in lines for sample in line.ids}
        requests = [
            Request(
                stage, batch, judges, part, stage + 1 == len(attack.parts), frozenset(blind.intersection(batch)),
                {name: samples.intersection(batch) for name, samples in right.items()},
                wanted.intersection(batch),
            )
            for batch in _batches([sample for sample in standing if sample not in done], batch_size)
        ]  # fmt: skip
        for answer in (crew or LocalCrew()).run(scene, requests):
            if keep is not None and answer.kept:
                keep(answer.line, answer.kept)
            ledger.append(answer.line)
            lines.append(answer.line)
            if tell is not None:
                tell(_moment(attack, stage, lines, standing, scene))
        broken = {sample for line in lines for sample in _marked(line, line.success)}
        blind |= {sample for line in lines for sample in _marked(line, line.zero_grad)}
        standing = [sample for sample in standing if sample not in broken]
    return _verdicts(attack, ids, attacked, judges, ledger.lines)


def _verdicts(
    attack: Attack[Any], ids: np.ndarray, attacked: np.ndarray, judges: Sequence[str], lines: Sequence[Line]
) -> Verdicts:
    place = {sample: row for row, sample in enumerate(ids.tolist())}
    pred = {name: np.full(len(ids), -1, dtype=np.int64) for name in judges}
    stage = np.full(len(ids), len(attack.parts), dtype=np.int64)
    zero_grad = np.zeros(len(ids), dtype=bool)
    for line in sorted(lines, key=lambda line: line.stage):
        for row, sample in enumerate(line.ids):
            at = place[sample]
            zero_grad[at] |= line.zero_grad[row]
            if line.success[row]:
                stage[at] = line.stage
            # A survivor keeps what the first stage made of it.
            if line.success[row] or line.stage == 0:
                for name in judges:
                    pred[name][at] = line.pred[name][row]
    return Verdicts(attacked, pred, stage, zero_grad, lines)


def still_right(clean: Clean, verdicts: Verdicts, label: np.ndarray, judge: str) -> np.ndarray:
    """bool [samples]: what a judge has right without and with the attack."""
    result: np.ndarray = (clean.pred[judge] == label) & (verdicts.pred[judge] == label)
    return result


def survivors(
    attack: Attack[Any], clean: Clean, verdicts: Verdicts, label: np.ndarray, judge: str, by_class: bool = False
) -> dict[str, Share]:
    """What a judge still has right after each stage of an attack; empty for an attack without stages."""
    right, lost = clean.pred[judge] == label, verdicts.pred[judge] != label
    found = {}
    for stage, name in enumerate(attack.stages):
        # What no stage was done with but is lost all the same (by rounding) goes at the end.
        gone = lost & ((verdicts.stage <= stage) | (stage + 1 == len(attack.stages)))
        found[name] = share_of(right & ~gone, label, by_class)
    return found


def _moment(attack: Attack[Any], stage: int, lines: Sequence[Line], standing: Sequence[int], scene: Scene) -> Moment:
    label = dict(zip(scene.images.ids.tolist(), scene.images.label.tolist(), strict=True))
    done = sum(len(line.ids) for line in lines)
    first = next(iter(lines[0].pred))
    over = sum(pred != label[sample] for line in lines for sample, pred in zip(line.ids, line.pred[first], strict=True))
    name = attack.stages[stage] if attack.stages else attack.config.name
    return Moment(name, done, len(standing), over, len(standing), len(scene.images))


def _batches(samples: Sequence[int], size: int) -> Iterator[list[int]]:
    return (list(samples[start : start + size]) for start in range(0, len(samples), size))


def _shares_of_cost(scene: Scene, line: Line) -> dict[str, Fraction]:
    """What part of a clean batch's cost is each judge's: the bare model's is one pass, a defence's its own units."""
    judges = {name: scene.target.judges[name].defended for name in line.pred}
    units = {name: 1 if defended is None else defended.cost_units for name, defended in judges.items()}
    return {name: Fraction(own, sum(units.values())) for name, own in units.items()}


def _only(line: Line, judge: str, shares: Mapping[str, Fraction]) -> Line:
    """A judge's part of a clean line."""
    facts = {judge: line.facts[judge]} if judge in line.facts else {}
    return Line(
        line.stage,
        line.ids,
        {judge: line.pred[judge]},
        passes=round(line.passes * shares[judge]),
        seconds=line.seconds * float(shares[judge]),
        facts=facts,
    )


def _gather(ids: np.ndarray, lines: Sequence[Line], judge: str) -> np.ndarray:
    found = {sample: pred for line in lines for sample, pred in zip(line.ids, line.pred[judge], strict=True)}
    return np.asarray([found[sample] for sample in ids.tolist()], dtype=np.int64)


def _marked(line: Line, marks: Sequence[bool]) -> list[int]:
    return [sample for sample, mark in zip(line.ids, marks, strict=True) if mark]
