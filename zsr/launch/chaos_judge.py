"""What a run has left behind, and whether that is what an undisturbed one leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pyarrow.fs import FileSelector

from zsr.launch.chaos_bed import BUCKET, Bed
from zsr.tracking.mlflow import KEY_TAG, connect

EXPERIMENT = "zsr"
TIMED = ("perf/", "cost/", "data/")
DELIVERY_WAIT_S = 45.0


@dataclass(frozen=True)
class Traces:
    """What a run has left.

    Attributes:
        step: of its newest checkpoint.
        files: weights and optimizer state of that, as they are stored.
        runs: how many runs MLflow has for it.
        status: what MLflow says of the last of them.
        curves: metric -> (step, value) points in order of arrival.
    """

    step: int
    files: Mapping[str, bytes]
    runs: int
    status: str
    curves: Mapping[str, list[tuple[int, float]]]


def read_traces(bed: Bed, name: str) -> Traces:
    """Look at the storage and at MLflow; waits a while for records that are still on their way there."""
    filesystem = bed.filesystem()
    infos = filesystem.get_file_info(FileSelector(f"{BUCKET}/runs"))
    folder = next(info.path for info in infos if info.base_name.startswith(f"{name}-"))
    run = folder.rpartition("/")[2]
    names = sorted(info.path for info in filesystem.get_file_info(FileSelector(f"{folder}/checkpoints")))

    def content(path: str) -> bytes:
        with filesystem.open_input_stream(path) as file:
            return bytes(file.read())

    state = json.loads(content(f"{names[-1]}/state.json"))
    files = {file: content(f"{names[-1]}/{file}") for file in state["sha256"]}

    client = connect(bed.mlflow_uri)
    deadline = time.monotonic() + DELIVERY_WAIT_S
    while True:
        found = client.get_experiment_by_name(EXPERIMENT)
        runs = client.search_runs([found.experiment_id], f"tags.`{KEY_TAG}` = 'run={run}'") if found else []
        status = runs[-1].info.status if runs else "MISSING"
        if status == "FINISHED" or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    curves = {}
    if runs:
        for metric in runs[-1].data.metrics:
            points = client.get_metric_history(runs[-1].info.run_id, metric)
            curves[metric] = [(point.step, point.value) for point in points]
    return Traces(state["step"], files, len(runs), status, curves)


def verdict(traces: Traces, calm: Traces) -> list[str]:
    """What is wrong, a sentence each; empty when nothing is."""
    problems = []
    if traces.step != calm.step:
        problems.append(f"weights are those of step {traces.step}, not {calm.step}")
    problems += [f"weights differ: {name}" for name in calm.files if traces.files.get(name) != calm.files[name]]
    if traces.runs != 1:
        problems.append(f"metrics are in {traces.runs} runs")
    if traces.status != "FINISHED":
        problems.append(f"metrics: the run is {traces.status}")
    for metric in sorted(calm.curves.keys() | traces.curves.keys()):
        theirs, ours = calm.curves.get(metric, []), traces.curves.get(metric, [])
        if sorted(step for step, _ in ours) != sorted(step for step, _ in theirs):
            problems.append(
                f"metrics: {metric} has steps {sorted(s for s, _ in ours)}, not {sorted(s for s, _ in theirs)}"
            )
        elif not metric.startswith(TIMED) and sorted(ours) != sorted(theirs):
            problems.append(f"metrics: {metric} has other values")
    return problems
