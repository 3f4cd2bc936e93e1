"""Pictures of a sweep: the trade-off, the search over time, and which settings mattered."""

from __future__ import annotations

import logging
from pathlib import Path

import optuna

from zsr.launch.results import CLEAN, ROBUST, Results
from zsr.tracking.plots import new_figure, save

log = logging.getLogger("zsr.launch")

FEWEST_FOR_IMPORTANCE = 4


def draw_charts(results: Results, study: optuna.Study, folder: Path) -> list[Path]:
    """Draw what there is enough data for; a picture that fails costs nothing but itself."""
    drawn = []
    for name, draw in (("pareto", _pareto), ("history", _history)):
        try:
            drawn.append(draw(results, folder / f"{name}.png"))
        except Exception as error:
            log.warning("chart=%s problem=%r", name, str(error)[:200])
    try:
        drawn += _importances(study, folder / "importances.png")
    except Exception as error:
        log.warning("chart=importances problem=%r", str(error)[:200])
    return drawn


def _pareto(results: Results, path: Path) -> Path:
    figure, axes = new_figure()
    for trial in results.trials:
        if CLEAN in trial.metrics and ROBUST in trial.metrics:
            style = {"finished": "o", "pruned": "x"}.get(trial.state, "s")
            color = "tab:red" if trial.flags else "tab:gray" if trial.state != "finished" else "tab:blue"
            axes.scatter(trial.metrics[CLEAN], trial.metrics[ROBUST], marker=style, color=color)
            axes.annotate(str(trial.number), (trial.metrics[CLEAN], trial.metrics[ROBUST]), fontsize=8)
    front = [(trial.metrics[CLEAN], trial.metrics[ROBUST]) for trial in results.front]
    if front:
        axes.plot(*zip(*front, strict=True), color="tab:green", label="Pareto front")
    axes.set(xlabel="clean accuracy", ylabel="robust accuracy", title="Trials (x stopped early, red not believed)")
    save(figure, path)
    return path


def _history(results: Results, path: Path) -> Path:
    figure, axes = new_figure()
    points = [(t.number, t.metrics[ROBUST]) for t in results.trials if t.state == "finished" and ROBUST in t.metrics]
    best = 0.0
    steps = []
    for number, value in points:
        best = max(best, value)
        steps.append((number, best))
    if points:
        axes.scatter(*zip(*points, strict=True), label="trial")
        axes.step(*zip(*steps, strict=True), where="post", color="tab:green", label="best so far")
    axes.set(xlabel="trial", ylabel="robust accuracy", title="The search over time")
    save(figure, path)
    return path


def _importances(study: optuna.Study, path: Path) -> list[Path]:
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        return []
    # The last objective is the robust one. This evaluator needs no scikit-learn.
    found = optuna.importance.get_param_importances(
        study,
        evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
        target=lambda trial: trial.values[-1],
    )
    figure, axes = new_figure()
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names])
    axes.set(xlabel="share", title=f"Which settings mattered ({len(complete)} trials: a hint, no proof)")
    save(figure, path)
    return [path]
