"""One run on Ray Train: workers, failures and checkpoints are Ray's, the training is the engine's.

A run is known by its name. Starting a name again continues it from its last checkpoint (and ends at once if it had
finished), so a name must stand for one configuration: ``run_name`` puts the configuration's digest into it.

With ``launch.min_workers`` the number of workers follows the cluster. The global batch, the learning rate and the order
of samples do not depend on it (zsr/data/plan.py), so a run goes on with exactly the samples that remain.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import ray.train
from ray.train import ControllerError, FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util import get_current_placement_group

from zsr.config import RunConfig
from zsr.config.schema import LaunchConfig
from zsr.engine.protocols import Session, Tracker
from zsr.launch.cost import priced
from zsr.launch.records import FOLDER, bring_records
from zsr.launch.remote_shelf import patiently
from zsr.launch.session import RaySession
from zsr.launch.store import Store
from zsr.launch.trials import PLACE
from zsr.tracking import RunTracker, make_tracker
from zsr.tracking.null import NullTracker
from zsr.tracking.record import record_end, record_start

Loop = Callable[[RunConfig, Session, Tracker], Any]

COLLECTIVE_TIMEOUT_S = 600
"""How long a rank waits in a collective for one that vanished without a word; torch's own default is half an hour."""

RAY_NOTES = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class RunTask:
    """What a worker needs to know; plain values, since it travels by pickle.

    Attributes:
        config: the run's settings, as plain data.
        name: of the Train run.
        title: of the run in the tracker.
        key: by which the tracker finds the run again.
        parent: key of the sweep's run.
        swept: the settings that the sweep chose.
        tags: labels for the tracker.
    """

    config: Mapping[str, Any]
    name: str
    title: str
    key: Mapping[str, str]
    parent: Mapping[str, str] | None = None
    swept: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunOutcome:
    """What rank 0 hands back.

    Attributes:
        metrics: the last ones, with ``step`` and ``epoch``.
        error: why the run ended early for a reason that another attempt would only meet again, such as divergence.
    """

    metrics: Mapping[str, float]
    error: str | None = None


class RunEndedError(ValueError):
    """A run ended early for a reason that another attempt would only meet again.

    Attributes:
        outcome: the reason, and what was reached before.
    """

    def __init__(self, outcome: RunOutcome) -> None:
        super().__init__(outcome.error)
        self.outcome = outcome


def run_name(config: RunConfig) -> str:
    """A name that stands for this configuration: another setting, another run."""
    return f"{config.name}-{config.digest()}"


def run_ray(
    config: RunConfig,
    name: str | None = None,
    *,
    title: str | None = None,
    key: Mapping[str, str] | None = None,
    parent: Mapping[str, str] | None = None,
    swept: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    storage: str | None = None,
    callbacks: Sequence[Any] = (),
    loop: Loop | None = None,
) -> ray.train.Result:
    """Train ``config`` with ``launch.workers`` workers and wait for the end.

    Args:
        config: the run's settings.
        name: of the run, by default :func:`run_name`; running it again continues it.
        title: what the tracker shows, by default the name.
        key: by which the tracker finds the run again, by default its name.
        parent: key of the tracker's run that this one belongs to.
        swept: settings worth a column when runs are compared.
        tags: labels for the tracker.
        storage: where to keep checkpoints, by default ``launch.storage``.
        callbacks: ``ray.train.UserCallback`` objects; they must not raise.
        loop: what each worker runs, by default the engine's.

    Returns:
        Ray's result; its ``return_value`` is a :class:`RunOutcome`. Metrics by step are in the tracker.

    Raises:
        ConfigError: ``launch.machine`` is not in the table of prices.
        RunEndedError: it diverged, or the data contradict its settings.
        ray.train.TrainingFailedError: it failed more than ``launch.max_failures`` times.
        OSError: the storage did not answer for minutes.
    """
    config = priced(config)  # here, since workers may lack the file of prices
    launch = config.launch
    name = name or run_name(config)
    store = Store(storage or launch.storage)
    task = RunTask(
        config=config.model_dump(mode="json"),
        name=name,
        title=title or name,
        key=key or {"run": name},
        parent=parent,
        swept=dict(swept or {}),
        tags=dict(tags or {}),
    )

    def fit() -> ray.train.Result:
        # The run's folder says which checkpoints there are. Ray's own list of them may be torn, or behind.
        patiently(lambda: store.remove(name, RAY_NOTES))
        return TorchTrainer(
            run_worker,
            train_loop_config={"task": asdict(task), "storage": store.root, "loop": loop},
            scaling_config=scaling(launch),
            torch_config=TorchConfig(
                backend="nccl" if launch.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=store.root,
                failure_config=FailureConfig(max_failures=launch.max_failures),
                callbacks=list(callbacks),
                logging_config=LoggingConfig(log_level="WARNING"),  # it announces each report with all its numbers
            ),
        ).fit()

    result = again_after_controller_errors(fit, launch.max_failures)
    if result.return_value.error:
        raise RunEndedError(result.return_value)
    return result


def scaling(launch: LaunchConfig) -> ScalingConfig:
    """How many workers of which size."""
    resources = {"CPU": launch.cpus_per_worker}
    if launch.gpus_per_worker:
        resources["GPU"] = launch.gpus_per_worker
    elastic = 0 < launch.min_workers < launch.workers
    return ScalingConfig(
        num_workers=(launch.min_workers, launch.workers) if elastic else launch.workers,
        use_gpu=launch.gpus_per_worker > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=launch.resize_every_s,
    )


def again_after_controller_errors(fit: Callable[[], ray.train.Result], attempts: int) -> ray.train.Result:
    """Call ``fit`` until it gives a result.

    Ray tries again when workers fail. It does not when its controller does: a node lost while processes find each other,
    a storage that is away at the moment when it writes its notes.
    """
    for attempt in range(attempts):
        try:
            return fit()
        except (ControllerError, OSError) as error:
            pause = min(2.0**attempt, 30.0)
            print(
                f"run=interrupted again_in={pause:g}s attempt={attempt + 1}/{attempts} problem={short(error)!r}",
                flush=True,
            )
            time.sleep(pause)
    return fit()


def short(error: BaseException) -> str:
    """The last line of an error, which says what happened; Ray's messages are whole traceback pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def run_worker(arguments: dict[str, Any]) -> RunOutcome:
    """What each Train worker executes: build the session and rank 0's tracker, then hand over to the loop."""
    task = RunTask(**arguments["task"])
    store = Store(arguments["storage"])
    config = RunConfig.model_validate(task.config)
    session = RaySession(store.child(task.name), config.train.keep_checkpoints)
    loop = arguments["loop"] or engine_loop()
    if task.parent:  # a sweep counts the time that a trial holds its place
        ray.train.report({PLACE: get_current_placement_group().id.hex()})
    if session.rank == 0:
        logging.getLogger("zsr").setLevel(logging.INFO)
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
    tracker = open_tracker(task, config, store) if session.rank == 0 else NullTracker()
    record_start(tracker, config, task.swept)
    try:
        result = loop(config, session, tracker)
    except (ArithmeticError, ValueError) as error:
        # Divergence, or settings that the data contradict: every rank meets the same, and so would every new attempt.
        # Handed back instead of raised, since Ray would try again.
        tracker.set_tags({"zsr.error": str(error)})
        tracker.finish("FAILED")
        return RunOutcome(session.last, f"{type(error).__name__}: {error}")
    except BaseException:
        # Ray may start the run again; the tracker then finds this record and sets it back to running.
        tracker.finish("FAILED")
        raise
    metrics = {**session.last, **result.metrics}
    record_end(tracker, metrics)
    tracker.finish("FINISHED")
    return RunOutcome(metrics)


def engine_loop() -> Loop:
    """zsr's training loop, imported where it runs: a driver on a head node needs no torch model."""
    from zsr.engine.loop import train

    return train


def open_tracker(task: RunTask, config: RunConfig, store: Store) -> RunTracker[Any]:
    """Rank 0's tracker; its records lie beside the checkpoints, where a restart on another node finds them."""
    patiently(partial(bring_records, store.child(task.name)))
    return make_tracker(
        config.tracking,
        run_name=task.title,
        key=task.key,
        parent=task.parent,
        folder=store.folder(task.name, FOLDER),
        tags=task.tags,
    )
