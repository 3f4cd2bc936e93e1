"""What fits a cluster: workers do not span nodes, limits of the autoscaler count, what never fits is refused with numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from zsr.config import ConfigError
from zsr.launch.capacity import LIMITS_VARIABLE, Capacity, Demand, Node, NodeType, read_limits, settle_concurrency
from zsr.launch.cluster import find_limits

HEAD = Node(0, 0, is_head=True)
L4 = NodeType("l4", Node(48, 4), 8)
A10G = NodeType("a10g", Node(48, 4), 4)


@pytest.mark.parametrize(
    ("nodes", "demand", "trials"),
    [
        # Eight CPUs on two nodes hold two workers of three each, not two and a remainder put together.
        ((Node(4, 0), Node(4, 0)), Demand(1, 3, 0), 2),
        ((Node(4, 0), Node(4, 0)), Demand(1, 5, 0), 0),
        ((Node(4, 0), Node(4, 0)), Demand(2, 2, 0), 2),
        ((Node(48, 4),), Demand(4, 8, 1), 1),
        ((Node(48, 4),), Demand(4, 13, 1), 0),  # three workers by CPUs
        ((Node(4, 1),), Demand(1, 0.5, 0.5), 2),
        ((), Demand(1, 1, 0), 0),
    ],
)
def test_trials_that_fit_now(nodes: tuple[Node, ...], demand: Demand, trials: int) -> None:
    assert Capacity(nodes).trials_now(demand) == trials
    assert Capacity(nodes).trials_grown(demand) == trials


@pytest.mark.parametrize(
    ("types", "most", "demand", "trials"),
    [
        ((L4, A10G), None, Demand(4, 8, 1), 12),
        ((L4, A10G), 8, Demand(4, 8, 1), 8),  # the bound on all types together
        ((L4,), 8, Demand(8, 8, 1), 4),  # two nodes for each
        (
            (NodeType("small", Node(8, 1), 8), L4),
            2,
            Demand(4, 8, 1),
            2,
        ),  # the larger ones are what the bound is best spent on
        ((L4,), 8, Demand(4, 49, 1), 0),
        ((L4,), 0, Demand(4, 8, 1), 0),
    ],
)
def test_trials_that_fit_when_grown(types: tuple[NodeType, ...], most: int | None, demand: Demand, trials: int) -> None:
    assert Capacity((HEAD,), types, most).trials_grown(demand) == trials


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"4 x \(49 CPUs, 1 GPUs\).*never fits.*8 x l4 \(48 CPUs, 4 GPUs\)"):
        # Even where somebody promised growth: the autoscaler's own limits are known here.
        settle_concurrency(Demand(4, 49, 1), Capacity((HEAD,), (L4,), 8), 16, max_concurrent=4)
    with pytest.raises(ConfigError, match="--max-concurrent"):
        settle_concurrency(Demand(1, 2, 0), Capacity((HEAD,)), 16, max_concurrent=None)


@pytest.mark.parametrize(
    ("capacity", "max_concurrent", "at_once", "waits"),
    [
        (Capacity((HEAD,), (L4,), 8), None, 8, True),
        (Capacity((HEAD,), (L4,), 8), 3, 3, True),
        (Capacity((HEAD, Node(48, 4)), (L4,), 8), 1, 1, False),
        (Capacity((HEAD, Node(48, 4))), None, 1, False),
        (Capacity((HEAD,)), 4, 4, True),  # limits unknown, growth promised
    ],
)
def test_concurrency_knows_what_the_cluster_may_grow_to(
    capacity: Capacity, max_concurrent: int | None, at_once: int, waits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settle_concurrency(Demand(4, 8, 1), capacity, 16, max_concurrent) == at_once
    assert ("trials wait for nodes" in capsys.readouterr().out) == waits


def test_limits_are_read_where_ray_up_leaves_them_and_where_the_variable_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(LIMITS_VARIABLE, raising=False)
    assert find_limits() == ((), None)
    launcher = Path(__file__).parents[2] / "cluster" / "aws.yaml"
    (tmp_path / "ray_bootstrap_config.yaml").write_text(launcher.read_text())
    types, most = find_limits()
    tree = yaml.safe_load(launcher.read_text())
    assert {kind.name: kind.most for kind in types} == {
        name: kind["max_workers"] for name, kind in tree["available_node_types"].items() if name != "head"
    }
    assert most == tree["max_workers"]

    monkeypatch.setenv(LIMITS_VARIABLE, json.dumps({"gpu": {"resources": {"CPU": 40, "GPU": 4}, "max_workers": 3}}))
    assert find_limits() == ((NodeType("gpu", Node(40, 4), 3),), None)
    monkeypatch.setenv(LIMITS_VARIABLE, str(tmp_path / "nothing.yaml"))
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        find_limits()


def test_a_file_of_something_else_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="available_node_types"):
        read_limits({"head_node_type": "head"})
