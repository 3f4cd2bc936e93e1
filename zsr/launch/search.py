"""Optuna behind Ray Tune: which point is tried next, and what a trial's outcome means to the search."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchGenerator
from ray.tune.search.optuna import OptunaSearch

from zsr.config import RunConfig
from zsr.launch.cost import find_budget
from zsr.launch.space import Point, Space
from zsr.launch.store import Store
from zsr.launch.study import Journal
from zsr.launch.trials import TrialBook


class SweepSearch(OptunaSearch):
    """OptunaSearch that numbers trials, writes each into the trial book, and forgives reports without the objective.

    Args:
        space: gives a point, as dotted settings, for an Optuna trial.
        base: settings that all trials share, which the space is shown.
        metrics: objectives with their modes; one gives a single-objective study.
        storage: where the study lives; survives the process.
        study_name: the sweep's id.
        seed: of the sampler.
        book: where trials are written down.
        first: points to try before the sampler chooses, by the names that the space gives its suggestions.
        purse: the sweep's folder, if what it may cost lies there; without one it runs all its trials.
        journal: the file that ``storage`` writes to, if it is one.
    """

    def __init__(
        self,
        space: Space,
        base: RunConfig,
        metrics: Sequence[tuple[str, str]],
        storage: optuna.storages.BaseStorage,
        study_name: str,
        seed: int,
        book: TrialBook,
        first: Sequence[Mapping[str, Any]] = (),
        purse: Store | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._book, self._purse, self._journal = book, purse, journal
        names, modes = [name for name, _ in metrics], [mode for _, mode in metrics]
        single = len(metrics) == 1
        super().__init__(
            space=_Suggest(space, base),
            metric=names[0] if single else names,
            mode=modes[0] if single else modes,
            study_name=study_name,
            storage=storage,
            sampler=make_sampler(seed),
            points_to_evaluate=[dict(point) for point in first] or None,
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        # Not kept here: this object comes back with a resume as it was, and the budget may be another one by then.
        budget = find_budget(self._purse) if self._purse else None
        refusal = budget.refusal(self._book.all()) if budget else None
        if refusal:
            print(f"stage=budget note='{refusal}'", flush=True)
            return str(self.FINISHED)
        suggestion = super().suggest(trial_id)
        number = self._ot_trials[trial_id].number
        point = suggestion["point"]
        self._book.create(number, trial_id, point)
        # Only what the trial needs, under fixed names: Tune flattens and prints whatever it finds here.
        return {"number": number, "point": point}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if isinstance(self.metric, str) and self.metric not in result:
            return
        super().on_trial_result(trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        # The space is code: it comes back with the sweep file, not from a pickle that may refer to another __main__.
        state = {key: value for key, value in self.__dict__.items() if key != "_space"}
        journal = self._journal.read() if self._journal else b""
        with open(checkpoint_path, "wb") as file:
            pickle.dump((journal, pickle.dumps(state)), file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            journal, state = pickle.load(file)
        if self._journal:
            self._journal.bring_back(journal)  # before the study is loaded, which reads it
        self.__dict__.update(pickle.loads(state))


class ResumableSearch(SearchGenerator):
    """Tune's side of a search, which asks again after a resume where the search had ended for want of money.

    Args:
        search: says which point is tried next.
        concurrent: trials at once.
    """

    def __init__(self, search: SweepSearch, concurrent: int) -> None:
        super().__init__(ConcurrencyLimiter(search, concurrent))

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({**state, "finished": False})


class _Suggest:
    """Wraps a space so that its point arrives as one value, apart from the names of the suggestions."""

    def __init__(self, space: Space, base: RunConfig) -> None:
        self.space, self.base = space, base

    def __call__(self, trial: Any) -> dict[str, Point]:
        return {"point": dict(self.space(trial, self.base))}


def make_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Multivariate TPE: for one objective or several, with trials running side by side."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate and group are marked experimental
        return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)


def make_scheduler(
    metrics: Sequence[tuple[str, str]], steps: int, grace: float, reduction_factor: float
) -> TrialScheduler:
    """ASHA over optimizer steps for one objective; none for several, where it would prune along one axis alone.

    Args:
        metrics: objectives with their modes.
        steps: of a full trial.
        grace: share of the steps that every trial gets.
        reduction_factor: one in so many goes on at each rung.
    """
    if len(metrics) > 1:
        return FIFOScheduler()
    return ASHAScheduler(
        # Not Tune's own iteration count, which starts again when a sweep is resumed.
        time_attr="step",
        metric=metrics[0][0],
        mode=metrics[0][1],
        max_t=steps + 1,  # full trials end by themselves
        grace_period=max(1, int(steps * grace)),
        reduction_factor=reduction_factor,
    )
