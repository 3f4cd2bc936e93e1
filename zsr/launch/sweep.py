"""A sweep from a value: ``Sweep(...)`` says what is searched, ``main(SWEEP)`` is the command that searches it.

In order: settings and 64 sampled points are checked, the plan is printed, and only then is anything touched. Trials run
on Ray Tune, each as a Ray Train run; Optuna's storage and the trial book hold the truth, so that ``--resume`` can go on
after any crash. At the end: the table, the Pareto front, the best configuration, checkpoint and model.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsr.config import ConfigError, apply_overrides, load_tree, validate
from zsr.launch.cost import priced
from zsr.launch.plan import Plan, count_trial_steps
from zsr.launch.space import Space, check_space
from zsr.launch.store import Store
from zsr.launch.strong import Finalists
from zsr.launch.trials import TrialBook

ROBUST = ("val/robust_acc", "max")
BOTH = (("val/clean_acc", "max"), ROBUST)


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving: poor trials stop early. For one objective only.

    Attributes:
        grace: share of its steps that every trial gets.
        reduction_factor: one trial in so many goes on at each rung.
    """

    grace: float = 0.25
    reduction_factor: float = 3.0


@dataclass(frozen=True)
class Variant:
    """What differs when a sweep runs on a certain preset.

    Attributes:
        num_trials: trials.
        max_concurrent: trials at once; ``None`` for as many as fit.
        multi_objective: search clean and robust accuracy at once.
        step_s: seconds a step takes there, evaluation included, for the plan.
        settings: overrides on top of the preset.
        test_sets: on which the best trial is compared with the untouched model at the end; they take no part in choosing.
        finalists: which trials are measured again by a strong attack, and how.
    """

    num_trials: int | None = None
    max_concurrent: int | None = None
    multi_objective: bool | None = None
    step_s: float | None = None
    settings: tuple[str, ...] = ()
    test_sets: tuple[str, ...] = ()
    finalists: Finalists | None = None


@dataclass(frozen=True)
class Sweep:
    """A search over settings.

    Attributes:
        name: of the sweep; its runs and its registered model carry it.
        preset: settings that all trials share, unless ``--preset`` names others.
        space: gives a point, as dotted settings, for an Optuna trial and the settings that all trials share.
        metrics: objectives of the multi-objective mode; the single-objective mode uses the last.
        settings: overrides on top of any preset, such as the objective that the space belongs to.
        num_trials: trials.
        multi_objective: search all metrics at once, without a scheduler, or the last one with ASHA.
        asha: when to stop poor trials.
        first: points to try first, by the names of the space's suggestions: what is known to be good.
        finalists: which trials are measured again by a strong attack before one is called the best, and how.
        variants: by preset.
        loop: what a worker runs, by default zsr's training loop.
        max_cost: dollars after which no new trial starts, unless ``--max-cost`` says otherwise; 0 for no limit.
    """

    name: str
    preset: str
    space: Space
    metrics: tuple[tuple[str, str], ...] = BOTH
    settings: tuple[str, ...] = ()
    num_trials: int = 32
    multi_objective: bool = False
    asha: Asha = Asha()
    first: Sequence[Mapping[str, Any]] = ()
    finalists: Finalists = field(default_factory=Finalists)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    loop: Any = None
    max_cost: float = 0.0


def main(sweep: Sweep, argv: Sequence[str] | None = None) -> int:
    """Run the command line of a sweep file; return the exit code.

    0: there is a best trial. 1: there is none. 2: a mistake in the command or the settings. 130: stopped.
    """
    from rich.console import Console

    asked = parse_arguments(sweep, argv)
    try:
        store, earlier = find_earlier(sweep, asked) if asked.resume else (None, None)
        if earlier is not None:
            asked = as_before(asked, earlier["asked"])
        plan = make_plan(sweep, asked)
        if store is not None and earlier is not None:
            refuse_without_money(plan, store, earlier)
        for line in plan.lines():
            print(line, flush=True)
        if asked.dry_run:
            print("dry_run=done note='nothing was started or written'", flush=True)
            return 0
        from zsr.launch.drive import drive  # Ray and Optuna's storage load here, not for --dry-run

        sweep_id = earlier["id"] if earlier else f"{plan.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        store = store or Store(plan.config.launch.storage).child(sweep_id)
        with stop_on_sigterm():
            return drive(sweep, plan, store, sweep_id, vars(asked), resume=earlier is not None)
    except (ConfigError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        print("stopped=yes note='go on with --resume'", flush=True)
        return 130


def parse_arguments(sweep: Sweep, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=f"Search {sweep.name}: trials on Ray, compared in MLflow.")
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings for all trials, such as train.epochs=5 attack.eps=2/255",
    )
    add("--preset", default=sweep.preset, help="settings to start from, by name or file (default: %(default)s)")
    add("--num-trials", type=_positive, help="trials in all")
    add("--workers-per-trial", type=_positive, help="Ray Train workers of each trial")
    add("--max-concurrent", type=_positive, help="trials at once (default: as many as the cluster holds)")
    add("--multi-objective", action=argparse.BooleanOptionalAction, default=None, help="search all metrics at once")
    add(
        "--single-objective",
        dest="multi_objective",
        action="store_false",
        help="search the last metric alone, with ASHA",
    )
    add("--max-cost", type=_dollars, help="dollars after which no new trial starts; needs the price of an hour")
    add("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    add("--name", default=sweep.name, help="of the sweep (default: %(default)s)")
    add(
        "--resume",
        action="store_true",
        help="go on with the newest sweep of this name, as it was asked for but for --max-cost; finished trials stay finished",
    )
    add("--dry-run", action="store_true", help="print the plan and stop; touches nothing")
    return parser.parse_intermixed_args(argv)


def make_plan(sweep: Sweep, asked: argparse.Namespace) -> Plan:
    """Settle and check everything that can be known without a cluster.

    Raises:
        ConfigError: a setting is wrong, or a point of the space leads to a wrong one.
    """
    variant = sweep.variants.get(asked.preset, Variant())
    tree = load_tree(asked.preset)
    layers = [*sweep.settings, *variant.settings]
    if os.environ.get("MLFLOW_TRACKING_URI"):
        # Workers do not inherit this process's environment, so the address goes into the settings.
        layers += ["tracking.name=mlflow", f"tracking.uri={os.environ['MLFLOW_TRACKING_URI']}"]
    if asked.workers_per_trial:
        layers.append(f"launch.workers={asked.workers_per_trial}")
    tree = apply_overrides(tree, [f"name={asked.name}", *layers, *asked.overrides])
    config = validate(tree)
    if config.tracking.experiment == "zsr":
        # An experiment of its own: MLflow's charts then show this search's trials side by side, and nothing else.
        tree = apply_overrides(tree, [f"tracking.experiment={asked.name}"])
        config = validate(tree)
    config = priced(config)
    tree = apply_overrides(tree, [f"launch.gpu_hour_price={config.launch.gpu_hour_price}"])
    max_cost = sweep.max_cost if asked.max_cost is None else asked.max_cost
    if max_cost and not config.launch.gpu_hour_price:
        raise ConfigError(
            f"--max-cost={max_cost:g}: nobody says what an hour costs; set launch.gpu_hour_price, or launch.machine to an "
            "entry of the table of prices"
        )
    finalists = variant.finalists or sweep.finalists
    finalists.attack_config(config)  # a mistake in it should not come to light after the last trial
    multi = next(m for m in (asked.multi_objective, variant.multi_objective, sweep.multi_objective) if m is not None)
    return Plan(
        name=asked.name,
        tree=tree,
        config=config,
        points=list(check_space(tree, sweep.space, asked.seed)),
        metrics=tuple(sweep.metrics if multi else sweep.metrics[-1:]),
        num_trials=asked.num_trials or variant.num_trials or sweep.num_trials,
        max_concurrent=asked.max_concurrent or variant.max_concurrent,
        steps=count_trial_steps(config),
        step_s=variant.step_s,
        seed=asked.seed,
        test_sets=variant.test_sets,
        finalists=finalists,
        max_cost=max_cost,
    )


def find_earlier(sweep: Sweep, asked: argparse.Namespace) -> tuple[Store, dict[str, Any]]:
    """The newest sweep called ``--name`` (or with exactly that id), where ``launch.storage`` says sweeps are kept.

    Raises:
        ConfigError: there is none.
    """
    tree = apply_overrides(load_tree(asked.preset), asked.overrides)
    root = Store(validate(tree).launch.storage)
    for name in sorted(root.names(), reverse=True):
        if name == asked.name or name.rsplit("-", 2)[0] == asked.name:
            found = root.read_json(name, "sweep.json")
            if found is not None:
                return root.child(name), found
    raise ConfigError(f"--resume: there is no sweep called {asked.name!r} under {root.root}; start it without --resume")


def as_before(asked: argparse.Namespace, earlier: Mapping[str, Any]) -> argparse.Namespace:
    """What a resumed sweep was asked for, with this command's word on what it may cost."""
    now = {"resume": True, "dry_run": asked.dry_run}
    if asked.max_cost is not None:
        now["max_cost"] = asked.max_cost
    return argparse.Namespace(**{**vars(asked), **earlier, **now})


def refuse_without_money(plan: Plan, store: Store, earlier: Mapping[str, Any]) -> None:
    """Nothing is begun where a sweep has said all that its budget allows.

    Raises:
        ConfigError: the budget is spent, trials are left, and the results of the others are out.
    """
    if plan.budget and earlier.get("ended"):
        spent_up = plan.budget.spent_up(TrialBook(store).all(), plan.num_trials)
        if spent_up:
            raise ConfigError(spent_up)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, not {text}")
    return number


def _dollars(text: str) -> float:
    amount = float(text)
    if amount <= 0:
        raise argparse.ArgumentTypeError(f"should be above 0, not {text}")
    return amount


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Treat ``ray job stop`` as Ctrl-C, so that the sweep's record can be closed."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit("this module is what sweep files call; run one of those, such as sweeps/tima_sweep.py")
