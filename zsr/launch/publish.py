"""What a sweep leaves behind: files in its folder, its page in the tracker, the best model in the registry."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from zsr.attacks.checks import CHECKS
from zsr.config import RunConfig, to_yaml
from zsr.launch.charts import draw_charts
from zsr.launch.guard import CHECK, check_levels
from zsr.launch.plan import Plan
from zsr.launch.results import FRONT_AXES, Results, cost_unit, markdown, worker_hours
from zsr.launch.space import point_config, point_overrides
from zsr.launch.store import Store
from zsr.launch.strong import STRONG
from zsr.launch.trial import TrialPlan
from zsr.launch.trials import TrialRecord
from zsr.tracking import RunTracker, make_tracker
from zsr.tracking.card import model_card

log = logging.getLogger("zsr.launch")


def open_sweep_tracker(plan: Plan, trial_plan: TrialPlan, store: Store, tags: Mapping[str, str]) -> RunTracker[Any]:
    """The sweep's own run, parent of its trials."""
    return make_tracker(
        plan.config.tracking,
        run_name=trial_plan.sweep_id,
        key=trial_plan.parent_key,
        folder=store.folder("tracking"),
        tags={"zsr.role": "sweep", **tags},
    )


def write_files(results: Results, plan: Plan, store: Store, study: optuna.Study) -> list[Path]:
    """Write table, best configuration and charts into the sweep's folder; return them."""
    folder = store.folder("results")
    files = [folder / "trials.md"]
    files[0].write_text(markdown(results, plan) + "\n")
    if results.best is not None:
        files.append(folder / "best.yaml")
        files[-1].write_text(to_yaml(point_config(plan.tree, results.best.point)))
    return files + draw_charts(results, study, folder)


def record_sweep(tracker: RunTracker[Any], results: Results, plan: Plan, files: list[Path], note: str) -> None:
    """Put the outcome on the sweep's page: the best trial's numbers, named as in the trials, and the table as note."""
    numbers = {"cost/worker_hours": sum(worker_hours(trial, plan) for trial in results.trials)}
    if results.best is not None:
        shown = [*(name for name, _ in FRONT_AXES), STRONG]
        numbers |= {name: results.best.metrics[name] for name in shown if name in results.best.metrics}
    tracker.log_metrics(numbers, step=len(results.trials))
    tracker.set_tags({"mlflow.note.content": note})
    for file in files:
        tracker.log_artifact(file)


def sweep_note(results: Results, plan: Plan, compare: str | None) -> str:
    """The Markdown that greets whoever opens the sweep's page."""
    lines = [f"**{plan.name}**: {len(results.trials)} trials of `{plan.config.objective.name}`.", ""]
    if compare:
        lines += [f"[Compare the trials side by side]({compare})", ""]
    return "\n".join([*lines, markdown(results, plan), ""])


def settle_trials(results: Results, plan: Plan, trial_plan: TrialPlan, store: Store) -> None:
    """Give every trial's run its end state, also those that were stopped before they could; deliver what was kept."""
    states = {"finished": "FINISHED", "diverged": "FAILED", "failed": "FAILED", "pruned": "KILLED", "running": "KILLED"}
    for trial in results.trials:
        if trial.state not in states or trial.attempts == 0:
            continue
        tracker = open_trial_tracker(trial, plan, trial_plan, store)
        if STRONG in trial.metrics:
            last_round = {
                name: value for name, value in trial.metrics.items() if name == STRONG or name.startswith(CHECK)
            }
            tracker.log_metrics(last_round, step=int(trial.metrics.get("step", 0)) + 1)
        tracker.set_tags({"zsr.state": trial.state, "zsr.flags": ", ".join(trial.flags)})
        # The whole bill, start-up and lost attempts included; while it ran, the loop could count its own time alone.
        tracker.log_metrics(plan.rate.metrics(trial.seconds), step=int(trial.metrics.get("step", 0)) + 1)
        tracker.finish(states[trial.state])  # type: ignore[arg-type]


def register_best(trial: TrialRecord, plan: Plan, trial_plan: TrialPlan, store: Store) -> Path | None:
    """Export the best trial's checkpoint for open_clip and register it as the next version of ``zsr-<sweep>``."""
    config = point_config(plan.tree, trial.point)
    folder = store.folder("results", "best-model")
    try:
        export_checkpoint(trial.checkpoint or "", folder)
    except Exception as error:  # a sweep's result does not hang on its export
        log.warning("export=failed checkpoint=%s problem=%r", trial.checkpoint, str(error)[:300])
        return None
    card = _card(trial, config, plan, trial_plan)
    (folder / "README.md").write_text(card)
    tracker = open_trial_tracker(trial, plan, trial_plan, store)
    tracker.register_model(f"zsr-{plan.name}", folder, card)
    tracker.finish("FINISHED")
    return folder


def export_checkpoint(address: str, folder: Path) -> None:
    """Write a checkpoint's model in open_clip's format.

    Raises:
        ValueError: it is no checkpoint.
    """
    from ray.train import Checkpoint

    from zsr.engine.checkpoint import load_trained
    from zsr.models.export import export_open_clip

    shutil.rmtree(folder, ignore_errors=True)
    with Checkpoint(address).as_directory() as local:
        model, _ = load_trained(Path(local))
    export_open_clip(model, folder)


def open_trial_tracker(trial: TrialRecord, plan: Plan, trial_plan: TrialPlan, store: Store) -> RunTracker[Any]:
    """A trial's own run, opened from outside the trial; its key leads to the same record."""
    return make_tracker(
        plan.config.tracking,
        run_name=f"{trial_plan.sweep_id}-{trial.number:03d}",
        key=trial_plan.trial_key(trial.number),
        parent=trial_plan.parent_key,
        folder=store.folder("train", trial.trial_id, "tracking"),
    )


def _card(trial: TrialRecord, config: RunConfig, plan: Plan, trial_plan: TrialPlan) -> str:
    unit, per_hour = cost_unit(plan)
    return model_card(
        config,
        {name: value for name, value in trial.metrics.items() if not name.startswith(CHECK)},
        title=f"Best of {trial_plan.sweep_id}",
        checks=[f"{name}: {level}. {CHECKS[name]}" for name, level in check_levels(trial.metrics).items()],
        origin={
            "sweep": trial_plan.sweep_id,
            "trial": trial.number,
            "configuration": config.digest(),
            "chosen settings": " ".join(point_overrides(trial.point)),
            unit: f"{worker_hours(trial, plan) * per_hour:.3f}",
        },
    )
