"""make chaos in short: two runs that are broken on purpose end as a run of two processes does that nothing happens to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from two_ranks import run_ranks

pytest.importorskip("ray")
from zsr.config import load_config
from zsr.engine.checkpoint import MODEL, OPTIMIZER
from zsr.engine.session import LocalSession
from zsr.launch.chaos import KINDS, LOGGED, NODES, STEPS, TRAINING, Blow, Outcome, Run, draw, table
from zsr.launch.chaos_bed import Bed
from zsr.launch.chaos_judge import Traces, read_traces, verdict


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(NODES) as bed:
        yield bed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of two processes without Ray, S3, MLflow or trouble."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(load_config("demo", [*TRAINING, "tracking.name=jsonl"]), folder, world_size=2)
    return LocalSession(folder).saved()[-1]


@pytest.mark.parametrize(
    "blows",
    [
        [Blow("worker", "node-1", 9, 0.3, 1), Blow("mlflow", "", 6, 0.0, 4)],
        pytest.param(
            # Early, since the last steps are over before a log tells of them.
            [Blow("driver", "", 6, 0.2, 1), Blow("raylet", "node-2", 9, 0.0, 2), Blow("s3", "", 12, 0.5, 2)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["worker-and-mlflow", "driver-raylet-and-s3"],
)
@pytest.mark.ray
@pytest.mark.network
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(1200)
def test_a_broken_run_ends_as_an_undisturbed_one(bed: Bed, undisturbed: Path, blows: list[Blow]) -> None:
    name = "-".join(blow.what for blow in blows)
    outcome = Outcome(0)
    run = Run(bed, name, blows, print)
    run.go(outcome)
    assert outcome.finished, (bed.home / f"{name}.log").read_text()[-3000:]
    assert len(outcome.blows) == len(blows), outcome.blows
    assert outcome.starts >= 2
    for service in ("s3", "mlflow"):
        bed.start(service)
        bed.wait(service)
    traces = read_traces(bed, name)
    if traces.status != "FINISHED":
        run.deliver(outcome)
        traces = read_traces(bed, name)
    assert traces.step == STEPS
    for file in (MODEL, OPTIMIZER):
        assert traces.files[file] == (undisturbed / file).read_bytes(), f"{file} differs after {outcome.blows}"
    assert (traces.runs, traces.status) == (1, "FINISHED")
    for metric, points in traces.curves.items():
        expected = [15, 30] if metric.startswith("val/") else list(range(LOGGED, STEPS + 1, LOGGED))
        assert sorted(step for step, _ in points) == expected, metric
    assert {"train/loss", "val/robust_acc"} <= traces.curves.keys()


def test_a_seed_decides_what_is_broken_and_when_and_every_kind_has_its_turn() -> None:
    drawn = [draw(seed, KINDS, 20.0) for seed in range(20)]
    assert drawn == [draw(seed, KINDS, 20.0) for seed in range(20)]
    assert [blows[0].what for blows in drawn[: len(KINDS)]] == list(KINDS)
    assert {len(blows) for blows in drawn} == {1, 2}
    for blow in (blow for blows in drawn for blow in blows):
        assert (blow.step is None and 0 <= blow.after_s <= 20) or (blow.step in range(3, STEPS, LOGGED))


def test_the_judge_sees_other_weights_and_metrics_that_are_missing_twice_there_or_different() -> None:
    calm = Traces(
        30, {MODEL: b"w"}, 1, "FINISHED", {"train/loss": [(3, 0.5), (6, 0.4)], "perf/x": [(3, 1.0), (6, 2.0)]}
    )

    def changed(**what: object) -> list[str]:
        return verdict(Traces(**{**vars(calm), **what}), calm)  # type: ignore[arg-type]

    assert changed() == []
    assert changed(curves={**calm.curves, "perf/x": [(6, 5.0), (3, 9.0)]}) == []  # how fast it went is nobody's promise
    assert changed(files={MODEL: b"v"}) == [f"weights differ: {MODEL}"]
    assert changed(step=24) == ["weights are those of step 24, not 30"]
    assert changed(runs=2) == ["metrics are in 2 runs"]
    assert changed(status="RUNNING") == ["metrics: the run is RUNNING"]
    for points in ([(3, 0.5)], [(3, 0.5), (6, 0.4), (6, 0.4)], [(3, 0.5), (6, 0.41)]):
        assert len(changed(curves={**calm.curves, "train/loss": points})) == 1
    rows = table([Outcome(4, ["driver at 3 s, step 0"], starts=2, seconds=9, finished=True, problems=changed(runs=2))])
    assert rows.splitlines()[-1] == "| 4 | driver at 3 s, step 0 | 1 | 9 | yes | yes | NO |"
