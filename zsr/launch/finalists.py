"""The last round of a sweep: its top trials again, by a strong attack and with the probes, and the best of them wins.

What decides a search is a cheap attack, and a cheap attack is what a search learns to defeat. All of this reads the validation
set; test sets take no part in choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from zsr.launch.guard import find_flags
from zsr.launch.plan import Plan
from zsr.launch.results import eligible, ranked
from zsr.launch.strong import STRONG, strong_job
from zsr.launch.trials import TrialBook, TrialRecord


def settle_finalists(
    trials: Sequence[TrialRecord],
    plan: Plan,
    book: TrialBook,
    measure: Callable[[Plan, Sequence[TrialRecord]], Iterator[tuple[TrialRecord, dict[str, float] | Exception]]],
) -> None:
    """Measure the top trials until enough have passed or none is left; write numbers and flags into the book.

    A trial that has its strong number already is not measured again; one that cannot be measured keeps its place and is not
    replaced.

    Args:
        measure: the trials' strong metrics in any order, or what went wrong.
    """
    waiting = iter(ranked([trial for trial in trials if eligible(trial, plan.metrics)], plan.metrics))
    settled = 0
    while batch := list(islice(waiting, plan.finalists.count - settled)):
        new = [trial for trial in batch if STRONG not in trial.metrics]
        if new:
            print(f"stage=finalists trials={','.join(str(trial.number) for trial in new)}", flush=True)
        for trial, found in measure(plan, new) if new else ():
            if isinstance(found, Exception):
                print(f"trial={trial.number} finalist=unmeasured problem={_short(found)!r}", flush=True)
                continue
            # A level is the graver of what both attacks showed.
            trial.metrics |= {name: max(value, trial.metrics.get(name, 0.0)) for name, value in found.items()}
            trial.flags = find_flags(trial.metrics)
            book.write(trial)
            flags = "".join(f" flag={flag}" for flag in trial.flags)
            print(f"trial={trial.number} finalist=measured strong_acc={trial.metrics[STRONG]:.4f}{flags}", flush=True)
        settled += sum(not trial.flags for trial in batch)


def measure_on_ray(
    plan: Plan, trials: Sequence[TrialRecord]
) -> Iterator[tuple[TrialRecord, dict[str, float] | Exception]]:
    """Each trial as a Ray task with a worker's resources, as many at once as fit."""
    import ray

    launch = plan.config.launch
    task = ray.remote(num_cpus=launch.cpus_per_worker, num_gpus=launch.gpus_per_worker, max_retries=2)(strong_job)
    pending = {task.remote(trial.checkpoint or "", dict(plan.tree), plan.finalists): trial for trial in trials}
    while pending:
        (ready, *_), _ = ray.wait(list(pending), num_returns=1)
        trial = pending.pop(ready)
        try:
            yield trial, ray.get(ready)
        except Exception as problem:
            yield trial, problem


def _short(problem: Exception) -> str:
    return str(problem).strip().splitlines()[-1][:200] if str(problem).strip() else type(problem).__name__
