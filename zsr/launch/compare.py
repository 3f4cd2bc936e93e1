"""A fair comparison of objectives: same model, data, steps and attack budget, each at its best of a small search.

Three waves of jobs, each job a Ray task on one CPU (or GPU): *search* trains every candidate of every objective once and
picks, on the validation set, the one with the best mean of clean and robust accuracy; *train* repeats the chosen ones with
every seed; *measure* attacks all of them on the test sets, which took no part until then. A finished job leaves a file,
so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zsr.config import ConfigError, RunConfig, apply_overrides, load_tree, validate
from zsr.config.plugins import suggest
from zsr.launch.compare_waves import Compare, Comparison, Job, Measure, objective_of
from zsr.launch.store import Store
from zsr.launch.sweep import stop_on_sigterm

__all__ = ["Comparison", "Measure", "main"]


def main(comparison: Comparison, argv: Sequence[str] | None = None) -> int:
    """Run the command line of a comparison file; return the exit code: 0 done, 1 some job failed, 2 a user's mistake."""
    asked = parse(comparison, argv)
    try:
        comparison, config, tree = _settle(comparison, asked)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    store = Store(config.launch.storage).child(comparison.name)
    compare = Compare(comparison, tree, store, on_ray(config))
    jobs, passes = compare.jobs_ahead()
    print(
        f"comparison={comparison.name} objectives={len(comparison.objectives)} seeds={len(comparison.seeds)} jobs={jobs} "
        f"training_passes={passes:.3g} folder={store.root}",
        flush=True,
    )
    if asked.dry_run:
        print("dry_run=done note='nothing was started or written'", flush=True)
        return 0
    from zsr.launch.compare_report import publish

    try:
        with stop_on_sigterm():
            outcome = compare.run()
    except KeyboardInterrupt:
        print("stopped=yes note='the same command goes on'", flush=True)
        return 130
    publish(outcome, comparison, config, store, Path(asked.report) if asked.report else None)
    for job, problem in outcome.failed.items():
        print(f"failed job={job} problem={problem!r}", flush=True)
    return 1 if outcome.failed else 0


def on_ray(config: RunConfig) -> Callable[..., None]:
    """Runs jobs as Ray tasks, as many at once as the cluster holds."""

    def run_jobs(jobs: Sequence[Job], take: Callable[[Job, dict[str, Any] | Exception], None]) -> None:
        import ray

        from zsr.launch.cluster import attach

        if not ray.is_initialized():
            attach(worker_output=False)
        task = ray.remote(num_cpus=config.launch.cpus_per_worker, num_gpus=config.launch.gpus_per_worker, max_retries=2)
        pending = {task(job.function).remote(**job.arguments): job for job in jobs}
        while pending:
            (ready, *_), _ = ray.wait(list(pending), num_returns=1)
            job = pending.pop(ready)
            try:
                take(job, ray.get(ready))
            except Exception as problem:
                take(job, problem)

    return run_jobs


def parse(comparison: Comparison, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare objectives: same data, steps and attack budget.")
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="settings for all runs, such as train.max_steps=64")
    add("--preset", default=comparison.preset, help="settings to start from (default: %(default)s)")
    add("--objectives", help="only these, separated by commas")
    add("--seeds", type=int, help="how many seeds")
    add("--num-samples", type=int, help="of each test set; 0 takes all")
    add("--name", default=comparison.name, help="the same name goes on with what is done (default: %(default)s)")
    add("--report", help="also write the tables into this Markdown file")
    add("--dry-run", action="store_true", help="check everything, print the plan and stop")
    return parser.parse_intermixed_args(argv)


def _settle(comparison: Comparison, asked: argparse.Namespace) -> tuple[Comparison, RunConfig, Mapping[str, Any]]:
    """The comparison as asked for, with its settings checked.

    Raises:
        ConfigError, ValueError: a setting is wrong.
    """
    layers = [f"name={asked.name}", *comparison.settings]
    if os.environ.get("MLFLOW_TRACKING_URI"):
        layers += ["tracking.name=mlflow", f"tracking.uri={os.environ['MLFLOW_TRACKING_URI']}"]
    tree = apply_overrides(load_tree(asked.preset), [*layers, f"tracking.experiment={asked.name}", *asked.overrides])
    config = validate(tree)
    if "://" in config.launch.storage:
        raise ValueError(
            f"launch.storage={config.launch.storage}: a comparison keeps its runs in a folder that all workers see; name one"
        )
    if not config.train.max_steps:
        raise ValueError("train.max_steps=0: a comparison gives every objective the same number of steps; set it")
    objectives = dict(comparison.objectives)
    if asked.objectives:
        names = [name.strip() for name in asked.objectives.split(",")]
        for name in names:
            if name not in objectives:
                raise ValueError(f"--objectives: {name} is not compared here{suggest(name, list(objectives))}")
        objectives = {name: objectives[name] for name in names}
    for name, options in objectives.items():
        for settings in options:
            validate(apply_overrides(tree, [f"objective={objective_of(name)}", *settings, *comparison.search_settings]))
    measures = comparison.measures
    if asked.num_samples is not None:
        measures = tuple(dataclasses.replace(measure, num_samples=asked.num_samples) for measure in measures)
    return (
        dataclasses.replace(
            comparison,
            name=asked.name,
            preset=asked.preset,
            objectives=objectives,
            measures=measures,
            seeds=comparison.seeds if asked.seeds is None else tuple(range(asked.seeds)),
        ),
        config,
        tree,
    )
