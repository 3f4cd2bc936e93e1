"""The part of a sweep that needs a cluster: run or resume the trials, then judge and publish them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsr.launch.capacity import Demand, settle_concurrency
from zsr.launch.cluster import attach, quiet_environment
from zsr.launch.cost import cost_meter, keep_budget
from zsr.launch.plan import Plan, duration
from zsr.launch.store import Store
from zsr.launch.trials import TrialBook

quiet_environment()  # before Ray is imported

import optuna  # noqa: E402
from ray import tune  # noqa: E402

from zsr.launch import publish  # noqa: E402
from zsr.launch.finalists import measure_on_ray, settle_finalists  # noqa: E402
from zsr.launch.progress import Progress  # noqa: E402
from zsr.launch.results import Results, judge, print_rows, print_table  # noqa: E402
from zsr.launch.search import ResumableSearch, SweepSearch, make_scheduler  # noqa: E402
from zsr.launch.study import Journal, close_study, open_study_storage  # noqa: E402
from zsr.launch.trial import TrialPlan, trial_function  # noqa: E402
from zsr.tracking.card import markdown_table  # noqa: E402
from zsr.tracking.environment import source_commit  # noqa: E402

if TYPE_CHECKING:
    from zsr.launch.sweep import Sweep

TUNE_FOLDER = "tune"
TRIAL_PROCESS_BYTES = 1_000_000


def drive(sweep: Sweep, plan: Plan, store: Store, sweep_id: str, asked: Mapping[str, Any], resume: bool) -> int:
    """Run all trials and publish the outcome; return the exit code."""
    print(f"stage=connect sweep={sweep_id} note='joining the Ray cluster'", flush=True)
    demand, capacity = Demand.of(plan.config.launch), attach(worker_output=False)
    concurrent = settle_concurrency(demand, capacity, plan.num_trials, plan.max_concurrent)
    trial_plan = TrialPlan(sweep_id, plan.tree, plan.metrics, store.root, sweep.loop)
    study_storage = open_study_storage(store, plan.config.launch.search)
    page = {"id": sweep_id, "name": plan.name, "asked": dict(asked)}
    store.write_json({**page, "ended": False}, "sweep.json")
    keep_budget(plan.budget, store)
    commit = source_commit()
    tracker = publish.open_sweep_tracker(plan, trial_plan, store, {"zsr.commit": commit} if commit else {})
    tracker.log_params({"method": plan.config.objective.name, "architecture": plan.config.model.name})

    total = plan.sweep_s(concurrent)
    about = f" about={duration(total)}" if total else ""
    verb = "resume" if resume else "search"
    print(f"stage={verb} trials={plan.num_trials} at_once={concurrent}{about} storage={store.root}", flush=True)
    status = "KILLED"
    try:
        with cost_meter(tracker, TrialBook(store), plan.rate):
            run_trials(sweep, plan, trial_plan, store, study_storage, concurrent)
        status = "FINISHED"
        trials = close_book(TrialBook(store))
        settle_finalists(trials, plan, TrialBook(store), measure_on_ray)
        print("stage=publish note='table, charts, best model; about 20s'", flush=True)
        study = close_study(study_storage, sweep_id)
        results = judge(trials, plan.metrics)
        code = finish(results, plan, trial_plan, store, study, tracker)
        store.write_json({**page, "ended": True}, "sweep.json")
        return code
    except Exception:
        status = "FAILED"
        raise
    except KeyboardInterrupt:
        # What was running says nothing more. A resume sets its runs back to running.
        publish.settle_trials(judge(TrialBook(store).all(), plan.metrics), plan, trial_plan, store)
        raise
    finally:
        tracker.finish(status)  # type: ignore[arg-type]


def run_trials(
    sweep: Sweep, plan: Plan, trial_plan: TrialPlan, store: Store, storage: optuna.storages.BaseStorage, concurrent: int
) -> None:
    """Let Tune run what is still to run."""
    # Nothing but a little memory for Tune's own process of a trial: its workers are placed by Train, which Tune knows
    # nothing of. Even a hundredth of a CPU each would leave one trial's workers less than fit, and the head has none.
    trainable = tune.with_resources(trial_function(trial_plan), {"CPU": 0, "memory": TRIAL_PROCESS_BYTES})
    path = store.at(TUNE_FOLDER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tune.Tuner.can_restore(path):
            tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, restart_errored=False).fit()
            return
        book = TrialBook(store)
        search = SweepSearch(
            sweep.space,
            plan.config,
            plan.metrics,
            storage,
            trial_plan.sweep_id,
            plan.seed,
            book,
            sweep.first,
            store,
            None if plan.config.launch.search else Journal(store),
        )
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=plan.num_trials,
                search_alg=ResumableSearch(search, concurrent),
                scheduler=make_scheduler(plan.metrics, plan.steps or 1, sweep.asha.grace, sweep.asha.reduction_factor),
            ),
            run_config=tune.RunConfig(
                name=TUNE_FOLDER,
                storage_path=store.root,
                verbose=0,
                callbacks=[Progress(plan, book, concurrent)],
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        ).fit()


def finish(results: Results, plan: Plan, trial_plan: TrialPlan, store: Store, study: optuna.Study, tracker: Any) -> int:
    """Publish and print; 0 if there is a best trial."""
    files = publish.write_files(results, plan, store, study)
    publish.settle_trials(results, plan, trial_plan, store)
    exported: Path | None = None
    if results.best is not None:
        exported = publish.register_best(results.best, plan, trial_plan, store)
    if exported is not None and plan.test_sets:
        files += compare_with_untouched(plan, exported, store, tracker)
    pages = tracker_pages(plan, trial_plan)
    note = publish.sweep_note(results, plan, pages[1] if pages else None)
    publish.record_sweep(tracker, results, plan, files, note)

    print_table(results, plan)
    best = results.best
    if best is None:
        print("best=none note='no trial finished with a value that can be believed'", flush=True)
    else:
        print(f"best trial={best.number} config={store.folder('results')}/best.yaml", flush=True)
        print(f"best checkpoint={best.checkpoint}", flush=True)
        if exported:
            print(f"best model={exported} (open_clip format)", flush=True)
    if pages:
        print(f"mlflow sweep={pages[0]}", flush=True)
        print(f"mlflow compare={pages[1]}", flush=True)
    return 0 if best is not None else 1


def compare_with_untouched(plan: Plan, model: Path, store: Store, tracker: Any) -> list[Path]:
    """Evaluate the best model and the untouched one on the test sets, print the table and return it as a file."""
    from zsr.launch.final import HEADER, Final, compare

    print(f"stage=final sets={','.join(plan.test_sets)} note='best trial against the untouched model'", flush=True)
    try:
        comparison = compare(Final(plan.test_sets), plan, model)
    except (OSError, ValueError) as error:
        print(f"stage=final problem={str(error)!r}", flush=True)
        return []
    tracker.log_metrics(comparison.metrics(), step=plan.num_trials)
    print_rows(f"Held-out sets, {comparison.attack}", HEADER, comparison.rows())
    path = store.folder("results") / "final.md"
    path.write_text("\n".join(markdown_table(HEADER, comparison.rows())) + "\n")
    return [path]


def tracker_pages(plan: Plan, trial_plan: TrialPlan) -> tuple[str, str] | None:
    """Addresses of the sweep's page and of the comparison of its trials, if MLflow keeps them."""
    if plan.config.tracking.name != "mlflow":
        return None
    from zsr.tracking.mlflow import mlflow_uri, run_pages

    tracking = plan.config.tracking
    return run_pages(mlflow_uri(tracking.uri), tracking.experiment, trial_plan.parent_key)


def close_book(book: TrialBook) -> list[Any]:
    """All trials, with none left open."""
    records = book.all()
    for record in records:
        if not record.ended:
            record.state, record.error = "failed", record.error or "lost when the sweep was interrupted"
            book.write(record)
    return records
