"""What zsr doctor --cluster makes of what nodes say: who differs is named, with the fix, and the worst state counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from zsr.cli import cluster_checks as judge
from zsr.cli.main import main
from zsr.config import load_config
from zsr.launch.capacity import Capacity, Node, NodeType
from zsr.launch.probe import ClusterReport, NodeReport, Probe, ask_tracking, decode_rate, try_storage
from zsr.launch.store import Store

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.11.0", "zsr": "0.1"}
GOOD = NodeReport(
    "10.0.0.1", False, VERSIONS, shm_bytes=8 * 10**9, store_bytes=2 * 10**9, sees_driver=True, images_per_s=400.0,
    tracking=200,
)  # fmt: skip
CONFIG = load_config("default", ["launch.storage=s3://bucket/zsr"])


def cluster(*nodes: NodeReport) -> ClusterReport:
    written = ["driver.json", "driver-again.json", *(f"{number}.json" for number in range(len(nodes)))]
    return ClusterReport(Capacity(), list(nodes), replace(GOOD, name="driver"), written)


@pytest.mark.parametrize(
    ("theirs", "state", "said"),
    [
        ({}, "ok", "ray 2.60.0"),
        ({"torch": "2.12.0"}, "fail", "torch 2.12.0 (here 2.11.0)"),
        ({"python": "3.11.9"}, "warn", "python 3.11.9 (here 3.11.7)"),
    ],
)
def test_versions_are_compared_with_the_drivers(theirs: dict[str, str], state: str, said: str) -> None:
    nodes = [GOOD, replace(GOOD, name="odd", versions={**VERSIONS, **theirs})]
    (finding,) = judge.versions(cluster(*nodes), nodes)
    assert finding.state == state
    assert said in finding.says
    assert ("odd" in finding.says) == bool(theirs)


def test_a_node_without_a_package_is_named() -> None:
    lacks = replace(GOOD, name="bare", versions={key: value for key, value in VERSIONS.items() if key != "zsr"})
    (finding,) = judge.versions(cluster(GOOD, lacks), [GOOD, lacks])
    assert finding.state == "fail" and "bare: zsr missing" in finding.says


def test_storage_must_be_one_place() -> None:
    both = [GOOD, replace(GOOD, name="other")]
    assert judge.storage(CONFIG, cluster(*both), both).state == "ok"
    apart = [GOOD, replace(GOOD, name="other", sees_driver=False)]
    assert "not one place: other" in judge.storage(CONFIG, cluster(*apart), apart).says
    # It sees the driver's file, but what it wrote did not arrive: a mount that only reads through.
    lost = replace(cluster(*both), written=["driver.json", "driver-again.json", "1.json"])
    assert judge.storage(CONFIG, lost, both).state == "fail"
    refused = [replace(GOOD, storage="OSError: AccessDenied")]
    assert "AccessDenied" in judge.storage(CONFIG, cluster(*refused), refused).says


@pytest.mark.parametrize(
    ("clock_s", "error_s", "state"),
    [(0.1, 0.01, "ok"), (-3.0, 0.01, "warn"), (3.0, 2.0, "ok"), (900.0, 0.01, "fail")],
)
def test_clocks_less_what_the_measurement_may_be_wrong_by(clock_s: float, error_s: float, state: str) -> None:
    nodes = [GOOD, replace(GOOD, name="late", clock_s=clock_s, clock_error_s=error_s)]
    finding = judge.clocks(nodes)
    assert finding.state == state
    assert ("late" in finding.says) == (state != "ok")


def test_shared_memory_holds_the_object_store() -> None:
    small = replace(GOOD, name="small", shm_bytes=64 * 10**6)
    assert [(f.state, "small" in f.says) for f in judge.shared_memory([GOOD, small])] == [("warn", True)]
    assert [f.state for f in judge.shared_memory([GOOD])] == ["ok"]
    assert [f.state for f in judge.shared_memory([replace(GOOD, store_bytes=9 * 10**9)])] == ["warn"]


def test_decoding_is_measured_against_the_slowest() -> None:
    config = load_config("default", ["launch.workers=4", "data.num_workers=3", "train.batch_size=128"])
    (finding,) = judge.data(config, [GOOD, replace(GOOD, images_per_s=300.0)])
    assert (finding.state, finding.says) == ("ok", "300 to 400 images/s a core; 12 decode, so about 3600/s")
    (finding,) = judge.data(config, [GOOD, GOOD, replace(GOOD, name="slow", images_per_s=100.0)])
    assert finding.state == "warn" and finding.says.endswith("slow: slow")
    (finding,) = judge.data(config, [GOOD, replace(GOOD, name="blind", data="ValueError: no set")])
    assert finding.state == "fail" and "blind: ValueError: no set" in finding.says


@pytest.mark.parametrize(
    ("answer", "state", "said"),
    [(200, "ok", "answers 1 nodes"), (401, "fail", "log-in"), (403, "warn", "403"), ("timed out", "warn", "timed out")],
)
def test_tracking_from_every_node(answer: int | str, state: str, said: str) -> None:
    config = load_config("default", ["tracking.name=mlflow", "tracking.uri=http://tracker:5000"])
    finding = judge.tracking(config, [replace(GOOD, tracking=answer)])
    assert finding.state == state and said in finding.says


@pytest.mark.parametrize(
    ("capacity", "state", "said"),
    [
        (Capacity((Node(4, 0),)), "ok", "4 fit now"),
        (Capacity((Node(0, 0, True),)), "fail", "0 fit now"),
        (
            Capacity((Node(0, 0, True),), (NodeType("w", Node(2, 0), 3),)),
            "warn",
            "0 fit now, 6 when the cluster has grown",
        ),
    ],
)
def test_demand(capacity: Capacity, state: str, said: str) -> None:
    finding = judge.demand(load_config("default"), ClusterReport(capacity, [], GOOD, []), 16)
    assert finding.state == state and said in finding.says and "each of 16 trials" in finding.says


def test_a_look_around_here(small_shards: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "runs"))
    store.write_json({}, "driver.json")
    config = load_config("default", [f"data.train={small_shards}"])
    said = NodeReport(**Probe().look(config.model_dump(mode="json"), store.root, "me"))
    assert (said.storage, said.sees_driver, said.data, said.tracking) == ("", True, "", None)
    assert said.images_per_s > 0 and said.versions["ray"] == "2.60.0"
    assert store.names() == ["driver.json", "me.json"]


def test_problems_are_words_not_exceptions(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problem, sees = try_storage(Store(str(tmp_path / "file" / "runs")), "me")
    assert "NotADirectoryError" in problem and not sees
    assert "nothing-here" in decode_rate(load_config("default", [f"data.train={tmp_path}/nothing-here"]))[0]
    config = load_config("default", ["tracking.name=mlflow", "tracking.uri=http://127.0.0.1:9"])
    assert "refused" in str(ask_tracking(config))


def test_a_file_without_a_sweep_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.py").write_text("NOTHING = 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--sweep", str(tmp_path / "empty.py")])
    assert ended.value.code == 2
    assert "no Sweep" in capsys.readouterr().err
