"""What a cluster holds and may grow to, against what a trial asks for: arithmetic over node shapes, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zsr.config import ConfigError
from zsr.config.schema import LaunchConfig


@dataclass(frozen=True)
class Demand:
    """What one trial asks for: so many workers, each with its CPUs and GPUs. A worker does not span nodes."""

    workers: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, launch: LaunchConfig) -> Demand:
        return cls(launch.workers, launch.cpus_per_worker, launch.gpus_per_worker)

    def __str__(self) -> str:
        return f"{self.workers} x ({self.cpus:g} CPUs, {self.gpus:g} GPUs)"


@dataclass(frozen=True)
class Node:
    """A node as it is, or as a node type promises it."""

    cpus: float
    gpus: float
    is_head: bool = False

    def holds(self, demand: Demand) -> int:
        """How many workers of ``demand`` fit."""
        fit = int(self.cpus // demand.cpus)
        return min(fit, int(self.gpus // demand.gpus)) if demand.gpus else fit


@dataclass(frozen=True)
class NodeType:
    """What the autoscaler may start: nodes of one shape, ``most`` at a time."""

    name: str
    shape: Node
    most: int

    def __str__(self) -> str:
        return f"{self.most} x {self.name} ({self.shape.cpus:g} CPUs, {self.shape.gpus:g} GPUs)"


@dataclass(frozen=True)
class Capacity:
    """A cluster.

    Attributes:
        nodes: that are there now.
        types: that an autoscaler may start; empty if there is none, or if its limits are not known here.
        most: workers of all types together, if that is bounded.
    """

    nodes: tuple[Node, ...] = ()
    types: tuple[NodeType, ...] = ()
    most: int | None = None

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def trials_now(self, demand: Demand) -> int:
        """How many trials fit at once on the nodes that are there."""
        return sum(node.holds(demand) for node in self.nodes) // demand.workers

    def trials_grown(self, demand: Demand) -> int:
        """How many fit when the autoscaler has started all that it may; as now, if there is none."""
        workers = sum(node.holds(demand) for node in self.nodes if node.is_head)
        left = sum(kind.most for kind in self.types) if self.most is None else self.most
        for kind in sorted(self.types, key=lambda kind: -kind.shape.holds(demand)):
            started = min(kind.most, left)
            workers, left = workers + started * kind.shape.holds(demand), left - started
        return max(workers // demand.workers, self.trials_now(demand))

    def describe(self) -> str:
        """What is there, in a few words."""
        text = f"{len(self.nodes)} nodes with {self.cpus:g} CPUs and {self.gpus:g} GPUs"
        if not self.types:
            return text
        bound = "" if self.most is None else f", {self.most} nodes in all"
        return f"{text}, and may grow to {' and '.join(map(str, self.types))}{bound}"


def settle_concurrency(demand: Demand, capacity: Capacity, num_trials: int, max_concurrent: int | None) -> int:
    """Trials at once: what fits, now or when the cluster has grown, and at most what was asked for.

    Raises:
        ConfigError: not one trial fits, ever, or not now and nobody said that the cluster will grow.
    """
    wanted = min(max_concurrent or num_trials, num_trials)
    now, grown = capacity.trials_now(demand), capacity.trials_grown(demand)
    if grown < 1 and (capacity.types or max_concurrent is None):
        hint = "" if capacity.types else f"; if it grows on demand, say so with {LIMITS_VARIABLE} or --max-concurrent"
        raise ConfigError(
            f"launch.workers={demand.workers}: one trial needs {demand}, which never fits: the cluster has "
            f"{capacity.describe()}; lower --workers-per-trial, launch.cpus_per_worker or launch.gpus_per_worker{hint}"
        )
    at_once = min(grown, wanted) if grown else wanted
    if now < at_once:
        print(
            f"stage=wait fits_now={now} at_once={at_once} note='a trial needs {demand}; there are {capacity.describe()}; "
            "trials wait for nodes'",
            flush=True,
        )
    return at_once


LIMITS_VARIABLE = "ZSR_NODE_TYPES"
"""Names the autoscaler's limits where Ray does not tell them: the path of its configuration, or node types inline."""


def read_limits(tree: Mapping[str, Any]) -> tuple[tuple[NodeType, ...], int | None]:
    """Node types and the bound on all of them, from the autoscaler's configuration.

    Args:
        tree: with ``available_node_types`` as in a file of Ray's cluster launcher: ``resources`` and ``max_workers`` each.

    Raises:
        ConfigError: it names no node types.
    """
    kinds = tree.get("available_node_types")
    if not isinstance(kinds, Mapping):
        raise ConfigError(
            f"{LIMITS_VARIABLE}: expected available_node_types with resources and max_workers for each type"
        )
    most = tree.get("max_workers")
    head = tree.get("head_node_type")
    found = []
    for name, kind in kinds.items():
        resources = kind.get("resources") or {}
        bound = kind.get("max_workers", most or 0)
        if bound and name != head:
            shape = Node(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)))
            found.append(NodeType(name, shape, int(bound)))
    return tuple(found), None if most is None else int(most)
