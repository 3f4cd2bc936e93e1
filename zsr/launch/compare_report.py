"""What a comparison leaves behind: tables in Markdown, a picture, its page in the tracker."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from zsr.attacks.checks import ZERO_GRAD_LIMIT
from zsr.config import RunConfig
from zsr.launch.compare_waves import UNTOUCHED, Comparison, Measure, Outcome
from zsr.launch.store import Store
from zsr.tracking import make_tracker
from zsr.tracking.plots import new_figure, save

BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"


def publish(outcome: Outcome, comparison: Comparison, config: RunConfig, store: Store, report: Path | None) -> None:
    """Write tables, numbers and picture into the comparison's folder, its tracker page and, if asked, a report file."""
    folder = store.folder("results")
    text = tables(outcome, comparison)
    files = [folder / "tables.md", folder / "runs.json"]
    files[0].write_text(text + "\n")
    files[1].write_text(json.dumps({"chosen": outcome.chosen, "runs": outcome.runs}, indent=1) + "\n")
    with contextlib.suppress(ModuleNotFoundError):  # a picture needs matplotlib; the tables say the same
        files.append(draw(outcome, comparison, folder / "trade-off.png"))
    tracker = make_tracker(
        config.tracking,
        run_name=comparison.name,
        key={"comparison": comparison.name},
        folder=store.folder("tracking"),
        tags={"zsr.role": "comparison", "mlflow.note.content": text},
    )
    for file in files:
        tracker.log_artifact(file)
    tracker.finish("FAILED" if outcome.failed else "FINISHED")
    print(text, flush=True)
    print(f"report={files[0]}", flush=True)
    if report is not None:
        insert(report, text)
        print(f"report={report}", flush=True)


def insert(report: Path, text: str) -> None:
    """Put the tables between the marks of a Markdown file; what people wrote around them stays."""
    old = report.read_text() if report.exists() else ""
    before, found, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if found else ""
    if not found and old:
        before = old.rstrip() + "\n\n"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(f"{before}{BEGIN}\n{text}\n{END}{after or chr(10)}")


def tables(outcome: Outcome, comparison: Comparison) -> str:
    """Every table, in Markdown: accuracies on each test set, bare and defended, then settings, cost and checks."""
    parts = []
    for measure in comparison.measures:
        for address in measure.sets:
            parts += _section(outcome, measure, address, len(comparison.seeds))
    parts += ["### Settings, cost and checks\n", _costs(outcome, comparison)]
    return "\n".join(parts)


def _section(outcome: Outcome, measure: Measure, address: str, num_seeds: int) -> list[str]:
    rows = _found(outcome, measure, address)
    if not rows:
        return [f"### {address}: {measure.name}\n\nNothing was measured.\n"]
    example = next(iter(rows.values()))[0]
    over = min(num_seeds, measure.num_seeds or num_seeds)
    attacks = "; ".join(f"{label} is {_words(settings)}" for label, settings in measure.attacks.items())
    parts = [
        f"### {address}: {measure.name}, {example['samples']} images, chance {100 * example['chance']:.1f} %\n",
        f"Accuracy in %{', mean and standard deviation over seeds' if over > 1 else ', of one seed'}; attacks: {attacks}.\n",
        _accuracies(rows, measure),
    ]
    if len(measure.attacks) > 1:
        parts.append(f"\nAll rows and budgets together, samples that withstand: {_withstand(rows, measure)}.")
    if measure.defence is not None:
        parts.append(f"\nThe same images with {_words(measure.defence)} on top; the attack does not know of it.\n")
        parts.append(_accuracies({name: [one["defended"] for one in found] for name, found in rows.items()}, measure))
    return [*parts, ""]


def checks(run: Mapping[str, Any], measures: Sequence[Measure]) -> list[str]:
    """Reasons not to believe a measured run's robust accuracies."""
    found = list(run["flags"])
    for measure in measures:
        found += _checks(run["measured"].get(measure.name, {}), measure)
    return list(dict.fromkeys(found))


def _checks(sets: Mapping[str, Any], measure: Measure) -> list[str]:
    found = []
    for address, measured in sets.items():
        robust = measured["robust"]
        slack = 1.0 / measured["samples"]  # one image
        for attack in measure.attacks:
            values = [robust[column] for column in measure.columns(attack)]
            if any(later > earlier + slack for earlier, later in itertools.pairwise(values)):
                found.append(f"{address}: {attack} does less harm with a larger budget")
        for weak, strong in itertools.pairwise(measure.attacks):
            columns = zip(measure.columns(weak), measure.columns(strong), strict=True)
            if any(robust[stronger] > robust[weaker] + slack for weaker, stronger in columns):
                found.append(f"{address}: {weak} does more harm than {strong}")
        blind = max(measured["zero_grad_frac"].values(), default=0.0)
        if blind > ZERO_GRAD_LIMIT:
            found.append(f"{address}: {100 * blind:.0f}% of images without a gradient")
        if any(value > measured["clean"] for value in robust.values()):
            found.append(f"{address}: robust above clean")
        for where, numbers in ((address, measured), (f"{address}, defended", measured.get("defended", {}))):
            # Their sentences, with the numbers of each seed, are in runs.json; results of before have none.
            doubts = {(finding["level"], finding["id"]): None for finding in numbers.get("findings", ())}
            found += [f"{where}: {level} {check}" for level, check in doubts]
    return found


def draw(outcome: Outcome, comparison: Comparison, path: Path) -> Path:
    """Clean against robust accuracy under the last attack at the largest budget but one: a point for each objective, a
    panel for each set."""
    measure = comparison.measures[0]
    columns = measure.columns(list(measure.attacks)[-1])
    column = columns[-2 if len(columns) > 1 else -1]
    sets = measure.sets
    figure, axes = new_figure(columns=len(sets))
    panels = list(axes) if len(sets) > 1 else [axes]
    for panel, address in zip(panels, sets, strict=True):
        for number, (name, found) in enumerate(_found(outcome, measure, address).items()):
            clean = [100 * one["clean"] for one in found]
            robust = [100 * one["robust"][column] for one in found]
            # Methods lie on top of each other: bars of a standard deviation say so better than names on the points would.
            panel.errorbar(
                _mean(clean), _mean(robust), _spread(robust), _spread(clean), "osD^vP"[number // 10], ms=5, lw=0.5,
                label=name,
            )  # fmt: skip
        panel.set(xlabel="clean accuracy, %", ylabel=f"accuracy under {column}, %", title=address)
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=7, loc="outside right center", title="mean of seeds, bars: sd"
    )
    save(figure, path)
    return path


def _found(outcome: Outcome, measure: Measure, address: str) -> dict[str, list[Mapping[str, Any]]]:
    """What a measure found on a set, by objective, one for each seed that it took."""
    found = {
        name: [run["measured"][measure.name][address] for run in runs if measure.name in run["measured"]]
        for name, runs in outcome.runs.items()
    }
    return {name: numbers for name, numbers in found.items() if numbers}


def _withstand(rows: Mapping[str, Sequence[Mapping[str, Any]]], measure: Measure) -> str:
    every = [one for found in rows.values() for one in found]
    count = {
        attack: sum(
            round(one["samples"] * one["robust"][column]) for one in every for column in measure.columns(attack)
        )
        for attack in measure.attacks
    }
    return ", ".join(f"{attack} {number}" for attack, number in count.items())


def _accuracies(found_by_objective: Mapping[str, Sequence[Mapping[str, Any]]], measure: Measure) -> str:
    columns = [column for attack in measure.attacks for column in measure.columns(attack)]
    rows = [["objective", "clean", *columns]]
    for name, found in found_by_objective.items():
        rows.append(
            [
                name,
                _cell([one["clean"] for one in found]),
                *(_cell([one["robust"][column] for one in found]) for column in columns),
            ]
        )
    return _markdown(rows)


def _costs(outcome: Outcome, comparison: Comparison) -> str:
    rows = [["objective", "chosen settings", "passes a step", "training, s", "seeds", "checks"]]
    for name, runs in outcome.runs.items():
        problems = sorted({problem for run in runs for problem in checks(run, comparison.measures)})
        if name == UNTOUCHED:
            rows.append([name, "", "0", "0", "1", "; ".join(problems) or "none raised"])
            continue
        chosen = outcome.chosen[name]
        seconds = median(run["train_s"] for run in runs)  # one that was interrupted counts its wait
        rows.append(
            [
                name,
                " ".join(chosen),
                str(runs[0]["units"]),
                f"{seconds:.0f}",
                str(len(runs)),
                "; ".join(problems) or "none raised",
            ]
        )
    for name in comparison.objectives:
        if name not in outcome.runs:
            rows.append([name, "no run to be believed or none finished", "", "", "0", ""])
    return _markdown(rows)


def _cell(shares: Sequence[float]) -> str:
    if len(shares) < 2:
        return f"{100 * _mean(shares):.1f}"
    return f"{100 * _mean(shares):.1f} ± {100 * _spread(shares):.1f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 for one value."""
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def _words(settings: Mapping[str, Any]) -> str:
    rest = " ".join(f"{key}={value}" for key, value in settings.items() if key != "name")
    return f"`{settings['name']} {rest}`".replace(" `", "`")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])
