"""One trial of a sweep, inside the small process that Ray Tune gives it: start a Train run, pass on what it reports.

A trial with one worker goes the same way. (A plain Tune function would start in a few seconds instead of 25, at the
price of a second way to checkpoint and resume.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from zsr.config import RunConfig
from zsr.launch.guard import honest
from zsr.launch.space import point_config
from zsr.launch.store import Store
from zsr.launch.train import Loop, RunEndedError, RunOutcome, run_ray
from zsr.launch.trials import PLACE, TrialBook, plain_metrics


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a sweep have in common; travels to each trial's process.

    Attributes:
        sweep_id: of the sweep, and key of its run in the tracker.
        tree: settings that all trials share, as plain data.
        metrics: objectives with their modes.
        storage: root of the sweep's folder.
        loop: what a worker runs; the engine's loop when ``None``.
    """

    sweep_id: str
    tree: Mapping[str, Any]
    metrics: tuple[tuple[str, str], ...]
    storage: str
    loop: Loop | None = None

    @property
    def parent_key(self) -> dict[str, str]:
        return {"sweep": self.sweep_id}

    def trial_key(self, number: int) -> dict[str, str]:
        """By which the tracker finds a trial's run, whatever process asks."""
        return {"sweep": self.sweep_id, "trial": str(number)}


class ForwardReports(TuneReportCallback):
    """Passes on to Tune where workers run, and reports that carry every objective: schedulers and search see finite, honest
    values.

    It lives in the run's controller, where an exception would end the run for good.
    """

    def __init__(self, metrics: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._metrics = tuple(metrics)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any | None) -> None:
        try:
            if PLACE in metrics[0]:
                super().after_report(run_context, [{PLACE: metrics[0][PLACE], "measured": {}}], checkpoint)
            elif all(name in metrics[0] for name, _ in self._metrics):
                super().after_report(run_context, [report(metrics[0], self._metrics)], checkpoint)
        except Exception as error:
            print(f"forward=failed problem={error!r}", flush=True)


def report(metrics: Mapping[str, Any], objectives: Sequence[tuple[str, str]], **more: Any) -> dict[str, Any]:
    """What Tune is told: the loop's numbers, as they are under ``measured``, and objectives that the search may see."""
    measured = plain_metrics(metrics)
    return {**measured, **honest(measured, objectives), "measured": measured, **more}


def trial_function(plan: TrialPlan) -> Callable[[dict[str, Any]], None]:
    """The function that Tune runs for each trial."""

    def trial(config: dict[str, Any]) -> None:
        run_trial(plan, config["number"], config["point"])

    return trial


def run_trial(plan: TrialPlan, number: int, point: Mapping[str, Any]) -> None:
    """Train one point; continue if it was begun; do nothing but repeat its result if it had finished."""
    store = Store(plan.storage)
    known = TrialBook(store).read(number)
    if known is not None and known.state in ("finished", "diverged"):
        # The sweep died between this trial's end and Tune's own note of it.
        tune.report(report(known.metrics, plan.metrics, ended=known.state))
        return
    config = point_config(plan.tree, point)
    try:
        outcome, checkpoint = train_point(plan, number, point, config, store)
    except RunEndedError as ended:
        tune.report(report(ended.outcome.metrics, plan.metrics, ended="diverged", error=ended.outcome.error))
        return
    # Said again at the end: a run that had ended before a restart reports nothing by itself.
    tune.report(report(outcome.metrics, plan.metrics, ended="finished", **checkpoint))


def train_point(
    plan: TrialPlan, number: int, point: Mapping[str, Any], config: RunConfig, store: Store
) -> tuple[RunOutcome, dict[str, str]]:
    """Run one configuration; return its outcome and, if it wrote one, its checkpoint's address."""
    result = run_ray(
        config,
        tune.get_context().get_trial_id(),
        title=f"{plan.sweep_id}-{number:03d}",
        key=plan.trial_key(number),
        parent=plan.parent_key,
        swept=point,
        tags={"zsr.role": "trial"},
        storage=store.at("train"),
        callbacks=[ForwardReports(plan.metrics)],
        loop=plan.loop,
    )
    return result.return_value, {"checkpoint_path": result.checkpoint.path} if result.checkpoint else {}
