"""The order of a comparison's work: search, train, measure; finished jobs are read, the others are run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsr.config import OBJECTIVES, apply_overrides, validate
from zsr.launch.compare_jobs import measure_job, train_job
from zsr.launch.store import Store

UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Measure:
    """How the trained models are measured.

    Attributes:
        name: of the wave of jobs, and what it measures: part of a table's title.
        sets: test sets, by address.
        eps: budgets, as text in pixel units.
        attacks: by label, from weak to strong, settings without eps; ``step_size_of_eps`` is a step in units of eps.
        defence: settings of a test-time defence to measure on top, or None.
        num_samples: of each set; 0 takes all.
        num_seeds: how many of the comparison's seeds, the first ones; 0 takes all.
        seed: of the attack's random starts.
    """

    name: str
    sets: tuple[str, ...]
    eps: tuple[str, ...]
    attacks: Mapping[str, Mapping[str, Any]]
    defence: Mapping[str, Any] | None = None
    num_samples: int = 0
    num_seeds: int = 0
    seed: int = 0

    def takes(self, number: int) -> bool:
        """Whether the comparison's ``number``-th seed, from 0, is measured."""
        return not self.num_seeds or number < self.num_seeds

    def columns(self, attack: str) -> list[str]:
        """Labels under which an attack's accuracies are kept, one for each budget."""
        return [f"{attack} {eps}" for eps in self.eps]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        name: of the comparison; with the same name it goes on.
        preset: settings that all runs share.
        objectives: for each objective the candidates of its search, as overrides; the same number for each is fair. An
            objective may be compared with itself under other settings: ``tima/aaai26`` is tima, shown under that name.
        measures: of the trained models, the one that is drawn first.
        settings: overrides on top of the preset.
        search_settings: overrides for the search alone, such as fewer steps.
        seeds: of the final runs.
    """

    name: str
    preset: str
    objectives: Mapping[str, Sequence[tuple[str, ...]]]
    measures: tuple[Measure, ...]
    settings: tuple[str, ...] = ()
    search_settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Job:
    """One piece of work: a function of this package, its arguments as plain data, its cost in encoder passes (of all images,
    and of a step)."""

    kind: str
    title: str
    function: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any]
    passes: float = 1.0
    units: int = 0

    @property
    def id(self) -> str:
        """The same for the same work. Settings at their defaults take no part: a setting that a later version adds leaves
        finished work finished."""
        content = {k: v for k, v in self.arguments.items() if k not in ("folder", "key", "parent")}
        content["tree"] = validate(dict(content["tree"])).model_dump(mode="json", exclude_defaults=True)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return f"{self.title}-{digest}"


@dataclass
class Outcome:
    """What a comparison found, by objective: the chosen settings, and for each seed its run and its measurements by name."""

    chosen: dict[str, tuple[str, ...]] = field(default_factory=dict)
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Compare:
    """One comparison on its way.

    Args:
        comparison: what is compared.
        tree: settings that all runs share, as plain data.
        store: where finished jobs, runs and the report are kept.
        run_jobs: runs jobs and calls back with each result; :func:`on_ray` outside tests.
    """

    def __init__(
        self,
        comparison: Comparison,
        tree: Mapping[str, Any],
        store: Store,
        run_jobs: Callable[[Sequence[Job], Callable[[Job, dict[str, Any] | Exception], None]], None],
    ) -> None:
        self.comparison, self.tree, self.store, self.run_jobs = comparison, tree, store, run_jobs
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Do what is not done yet."""
        objectives = self.comparison.objectives
        candidates = {
            (name, number): self._train(
                "search", f"{name}-{number}", name, [*settings, *self.comparison.search_settings]
            )
            for name, options in objectives.items()
            for number, settings in enumerate(options)
        }
        found = self._wave("search", list(candidates.values()))
        for name, options in objectives.items():
            scores = [score(found.get(candidates[name, number].id)) for number in range(len(options))]
            best = max(range(len(options)), key=scores.__getitem__)
            if scores[best] > 0:
                self.outcome.chosen[name] = tuple(options[best])
                print(
                    f"chosen objective={name} score={scores[best]:.4f} settings={' '.join(options[best])}", flush=True
                )
        finals = {
            (name, seed): self._train("train", f"{name}-seed{seed}", name, [*settings, f"seed={seed}"])
            for seed in self.comparison.seeds
            for name, settings in self.outcome.chosen.items()
        }
        trained = self._wave("train", list(finals.values()))
        runs: dict[tuple[str, int], dict[str, Any]] = {(UNTOUCHED, 0): {"seed": 0, "flags": [], "measured": {}}}
        for (name, seed), job in finals.items():
            result = trained.get(job.id, {})
            if "checkpoint" in result:
                runs[name, seed] = {
                    "seed": seed,
                    "units": job.units,
                    "train_s": result["seconds"],
                    "flags": result["flags"],
                    "val": result["metrics"],
                    "measured": {},
                }
        for measure in self.comparison.measures:
            jobs = {}
            for name, seed in runs:
                if name == UNTOUCHED:
                    jobs[name, seed] = self._measure(measure, UNTOUCHED, None, self.tree)
                elif measure.takes(self.comparison.seeds.index(seed)):
                    job = finals[name, seed]
                    checkpoint = trained[job.id]["checkpoint"]
                    jobs[name, seed] = self._measure(measure, f"{name}-seed{seed}", checkpoint, job.arguments["tree"])
            found_now = self._wave(measure.name, list(jobs.values()))
            for key, job in jobs.items():
                if job.id in found_now:
                    runs[key]["measured"][measure.name] = found_now[job.id]["sets"]
        for (name, _), run in runs.items():
            if run["measured"]:
                self.outcome.runs.setdefault(name, []).append(run)
        return self.outcome

    def jobs_ahead(self) -> tuple[int, float]:
        """(jobs, encoder passes) of a whole comparison, for the plan."""
        count, passes = 0, 0.0
        for name, options in self.comparison.objectives.items():
            for extra, times in (
                (self.comparison.search_settings, len(options)),
                ((), len(self.comparison.seeds)),
            ):
                job = self._train("plan", name, name, [*options[0], *extra])
                count, passes = count + times, passes + times * job.passes
        for measure in self.comparison.measures:
            seeds = sum(map(measure.takes, range(len(self.comparison.seeds))))
            count += 1 + seeds * len(self.comparison.objectives)
        return count, passes

    def _train(self, kind: str, title: str, objective: str, overrides: Sequence[str]) -> Job:
        title = title.replace("/", "-")
        layers = [f"name={self.comparison.name}-{title}", f"objective={objective_of(objective)}", *overrides]
        config = validate(apply_overrides(self.tree, layers))
        units = OBJECTIVES.build(config.objective).cost_units(getattr(config.attack, "steps", 0))
        key = {"comparison": self.comparison.name, kind: title}
        return Job(
            kind,
            title,
            train_job,
            {
                "tree": config.model_dump(mode="json"),
                "folder": self.store.at("runs", f"{kind}-{title}-{config.digest()}"),
                "key": key,
                "parent": {"comparison": self.comparison.name},
            },
            passes=units * config.train.max_steps * config.train.batch_size,
            units=units,
        )

    def _measure(self, measure: Measure, title: str, checkpoint: str | None, tree: Mapping[str, Any]) -> Job:
        content = dataclasses.asdict(measure)
        for where in ("name", "num_seeds"):  # say which models, not what is done with one
            del content[where]
        arguments = {"checkpoint": checkpoint, "tree": tree, "measure": content}
        return Job(measure.name, title.replace("/", "-"), measure_job, arguments)

    def _wave(self, name: str, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Results by job id: read where a job is done, run where it is not."""
        results = {job.id: self.store.read_json("jobs", f"{job.kind}-{job.id}.json") for job in jobs}
        left = [job for job in jobs if results[job.id] is None]
        progress = Progress(name, len(jobs), left)

        def take(job: Job, result: dict[str, Any] | Exception) -> None:
            if isinstance(result, Exception):
                self.outcome.failed[job.id] = str(result).strip().splitlines()[-1]
            else:
                self.store.write_json(result, "jobs", f"{job.kind}-{job.id}.json")
                results[job.id] = result
            progress.ended(job, result)

        if left:
            self.run_jobs(left, take)
        return {job: result for job, result in results.items() if result is not None}


class Progress:
    """One line for each job that ends, with what is left and how long it will take at the pace so far."""

    def __init__(self, wave: str, total: int, left: Sequence[Job]) -> None:
        self.wave, self.total, self.done = wave, total, total - len(left)
        self.passes, self.passes_done = sum(job.passes for job in left), 0.0
        self.began = time.monotonic()
        print(f"wave={wave} jobs={total} done_before={self.done}", flush=True)

    def ended(self, job: Job, result: dict[str, Any] | Exception) -> None:
        self.done += 1
        self.passes_done += job.passes
        elapsed = time.monotonic() - self.began
        eta = elapsed / self.passes_done * (self.passes - self.passes_done)
        print(
            f"wave={self.wave} job={job.title} {_headline(result)} done={self.done}/{self.total} "
            f"elapsed={elapsed:.0f}s eta={eta:.0f}s",
            flush=True,
        )


def objective_of(label: str) -> str:
    """The objective that a label of the comparison stands for."""
    return label.partition("/")[0]


def score(result: Mapping[str, Any] | None) -> float:
    """What a candidate is chosen by: the mean of clean and robust validation accuracy; 0 for a run not to be believed."""
    if result is None or result["flags"]:
        return 0.0
    metrics = result["metrics"]
    return float(metrics["val/clean_acc"] + metrics["val/robust_acc"]) / 2


def _headline(result: dict[str, Any] | Exception) -> str:
    if isinstance(result, Exception):
        return f"state=failed problem={str(result).strip().splitlines()[-1][:200]!r}"
    if "sets" in result:
        every = [one for bare in result["sets"].values() for one in (bare, bare.get("defended", {}))]
        doubts = {f" check={found['id']}:{found['level']}": None for one in every for found in one.get("findings", ())}
        return f"state=measured took={result['seconds']:.0f}s" + "".join(doubts)
    metrics = result["metrics"]
    if not metrics:
        return "state=diverged"
    return (
        f"clean={metrics['val/clean_acc']:.3f} robust={metrics['val/robust_acc']:.3f} took={result['seconds']:.0f}s"
        + "".join(f" flag={flag}" for flag in result["flags"])
    )
