"""What a sweep found: the table of trials, the Pareto front and the best trial, from the trial book."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from zsr.launch.plan import Plan, duration
from zsr.launch.space import point_overrides
from zsr.launch.strong import STRONG
from zsr.launch.trials import TrialRecord
from zsr.tracking.card import markdown_table, show

CLEAN, ROBUST = "val/clean_acc", "val/robust_acc"
FRONT_AXES = ((CLEAN, "max"), (ROBUST, "max"))
_NUMBERS = ("clean", "robust", "strong", "cost", "time", "images", "GPU-hours", "worker-hours")
Objectives = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Results:
    """The trials of a sweep, judged.

    Attributes:
        trials: all of them, by number.
        front: those that no other beats in clean and robust accuracy at once, by clean accuracy.
        best: what the sweep recommends, if any trial finished and can be believed.
    """

    trials: list[TrialRecord]
    front: list[TrialRecord]
    best: TrialRecord | None


def judge(trials: Sequence[TrialRecord], objectives: Objectives) -> Results:
    """Find the front and the best. A flagged, stopped or failed trial can be neither.

    Where finalists were measured again, the strong attack decides between them. Else, and between equals, the last objective
    does, the others break ties: with clean and robust accuracy the best is the most robust trial, and the front shows what
    it costs.
    """
    order = ranked([trial for trial in trials if eligible(trial, objectives)], objectives)
    finalists = [trial for trial in order if STRONG in trial.metrics]
    best = max(finalists, key=lambda trial: trial.metrics[STRONG]) if finalists else next(iter(order), None)
    return Results(sorted(trials, key=lambda trial: trial.number), pareto_front(order), best)


def ranked(trials: Sequence[TrialRecord], objectives: Objectives) -> list[TrialRecord]:
    """The best first, by the cheap attack that the search saw."""
    return sorted(trials, key=lambda trial: [_signed(trial, axis) for axis in reversed(objectives)], reverse=True)


def eligible(trial: TrialRecord, objectives: Objectives) -> bool:
    """Whether a trial ran to its end, gave finite numbers and carries no flag."""
    values = [trial.metrics.get(name, math.nan) for name, _ in objectives]
    return trial.state == "finished" and not trial.flags and all(map(math.isfinite, values))


def pareto_front(trials: Sequence[TrialRecord], axes: Objectives = FRONT_AXES) -> list[TrialRecord]:
    """Trials that no other equals or beats on every axis while beating it on one."""
    known = [trial for trial in trials if all(name in trial.metrics for name, _ in axes)]

    def dominated(trial: TrialRecord) -> bool:
        mine = [_signed(trial, axis) for axis in axes]
        others = ([_signed(other, axis) for axis in axes] for other in known)
        return any(all(o >= m for o, m in zip(other, mine)) and other != mine for other in others)

    return sorted((trial for trial in known if not dominated(trial)), key=lambda trial: trial.metrics[axes[0][0]])


def worker_hours(trial: TrialRecord, plan: Plan) -> float:
    """Hours that a trial kept its workers, start-up included: what is paid for."""
    return trial.seconds * plan.config.launch.workers / 3600


def cost_unit(plan: Plan) -> tuple[str, float]:
    """What cost is counted in, and how many of it an hour of one worker is."""
    launch = plan.config.launch
    return ("GPU-hours", launch.gpus_per_worker) if launch.gpus_per_worker else ("worker-hours", 1.0)


def rows(results: Results, plan: Plan, only: Sequence[TrialRecord] | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of trials."""
    unit, per_hour = cost_unit(plan)
    price = plan.config.launch.gpu_hour_price
    strong = ["strong"] if any(STRONG in trial.metrics for trial in results.trials) else []
    header = [
        "trial",
        "state",
        "clean",
        "robust",
        *strong,
        unit,
        *(["cost"] if price else []),
        "time",
        "settings",
        "remarks",
    ]
    front = {trial.number for trial in results.front}
    body = []
    for trial in results.trials if only is None else only:
        amount = worker_hours(trial, plan) * per_hour
        is_best = results.best is not None and trial.number == results.best.number
        remarks = [*(["best"] if is_best else []), *(["Pareto"] if trial.number in front else [])]
        remarks += [f"flag={flag}" for flag in trial.flags]
        body.append(
            [
                str(trial.number),
                trial.state,
                show(trial.metrics.get(CLEAN)),
                show(trial.metrics.get(ROBUST)),
                *[show(trial.metrics.get(STRONG)) for _ in strong],
                f"{amount:.3f}",
                *([f"{plan.rate.cost(trial.seconds):.2f}"] if price else []),
                duration(trial.seconds),
                " ".join(_brief(override) for override in point_overrides(trial.point)),
                ", ".join(remarks),
            ]
        )
    return header, body


def print_table(results: Results, plan: Plan) -> None:
    """The table of trials and the front, on the screen."""
    print_rows("Trials", *rows(results, plan))
    # The front is a choice between numbers; settings are in the table above.
    header, body = rows(results, plan, results.front)
    keep = [header.index(name) for name in ("trial", "clean", "robust", "strong") if name in header]
    print_rows("Pareto front", [header[i] for i in keep], [[row[i] for i in keep] for row in body])


def print_rows(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """One table on the screen; wide where nobody can say how wide the screen is, as in a job's output."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right" if name in _NUMBERS or name.endswith("%") else "left")
    for row in body:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 160).print(table)


def markdown(results: Results, plan: Plan) -> str:
    """The same table for a page."""
    return "\n".join(markdown_table(*rows(results, plan)))


def _signed(trial: TrialRecord, objective: tuple[str, str]) -> float:
    name, mode = objective
    return trial.metrics[name] if mode == "max" else -trial.metrics[name]


def _brief(override: str) -> str:
    """An override short enough for a table cell: last part of the path, four digits."""
    key, _, value = override.partition("=")
    with contextlib.suppress(ValueError):
        value = f"{float(value):.3g}"
    return f"{key.rpartition('.')[2]}={value}"
