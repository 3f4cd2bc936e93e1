"""Records on an MLflow server, by way of the disk: training never notices a server that is slow, away or restarted.

Every call appends to ``mlflow-spool.jsonl``. A thread delivers it in order and marks what arrived, tries again with
growing pauses while the server is away, and goes on where it stopped when the same run starts anew. A run is found by
its tag ``zsr.key`` and never made twice. No metric is there twice for a step: steps already in the spool or on the
server are dropped (zsr/tracking/spool.py says why), and a delivery repeated after a lost answer carries the same time
stamps, which MLflow's store recognises.

This is the only module that imports mlflow, and it does so in its thread (the import takes seconds).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zsr.config.base import refuse_password, without_password
from zsr.engine.protocols import RunStatus
from zsr.tracking.base import RunIdentity, RunTracker, TrackerConfig, key_text, log
from zsr.tracking.sender import RejectedError, Sender
from zsr.tracking.spool import Record, Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "zsr.key"
SPOOL_NAME = "mlflow-spool.jsonl"


class MlflowConfig(TrackerConfig):
    """``uri`` is the server's address, by default that of MLFLOW_TRACKING_URI."""

    name: Literal["mlflow"] = "mlflow"


class MlflowTracker(RunTracker[MlflowConfig]):
    """Spools every record and delivers from a thread.

    Args:
        config: address and experiment.
        identity: which run this is.
        folder: where the spool lies.
        finish_wait_s: how long ``finish`` waits for deliveries before it leaves them to the spool.

    Raises:
        ValueError: no address is known.
    """

    spool_name = SPOOL_NAME
    _sender: Sender | None = None

    def __init__(self, config: MlflowConfig, identity: RunIdentity, folder: Path, finish_wait_s: float = 20.0) -> None:
        super().__init__(config.model_copy(update={"uri": mlflow_uri(config.uri)}), identity, folder)
        self._finish_wait_s = finish_wait_s
        self._sender = Sender(self.spool, lambda: RemoteRun(_last_start(self.spool)))
        self._sender.start()

    def finish(self, status: RunStatus) -> None:
        super().finish(status)
        if self._sender is not None and not self._sender.finish(self._finish_wait_s):
            log.warning(
                "tracker undelivered=%d spool=%s note=%r", self.spool.num_pending(), self.spool.path,
                "MLflow is away; the records are sent when this run starts again, or when its sweep ends or resumes",
            )  # fmt: skip

    def _record(self, kind: str, **content: Any) -> None:
        super()._record(kind, **content)
        if self._sender is not None:
            self._sender.wake()


def mlflow_uri(uri: str | None) -> str:
    """The server's address from the settings or the environment.

    Raises:
        ValueError: neither has one, or it has a password in it.
    """
    found = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not found:
        raise ValueError(
            "tracking.uri is empty and MLFLOW_TRACKING_URI is not set; set one of them to the MLflow server's address, "
            "or choose tracking.name=jsonl"
        )
    try:
        return refuse_password(found)
    except ValueError as error:
        raise ValueError(f"MLFLOW_TRACKING_URI={without_password(found)}: {error}") from None


class RemoteRun:
    """One run on the server: found by its key or made, then fed records.

    Args:
        start: the spool's start record, which says where and who.
    """

    def __init__(self, start: Record) -> None:
        self._client = connect(start["config"]["uri"])
        self._experiment_id = _experiment(self._client, start["config"]["experiment"])
        self._parent = start["parent"]
        self._known_steps: dict[str, int] = {}
        key = key_text(start["key"])
        run = _find(self._client, self._experiment_id, key)
        if run is None:
            tags = {**start["tags"], KEY_TAG: key, **{f"zsr.{name}": value for name, value in start["key"].items()}}
            run = self._client.create_run(self._experiment_id, start["time"], tags=tags, run_name=start["name"])
        else:
            for metric in run.data.metrics:
                points = self._client.get_metric_history(run.info.run_id, metric)
                self._known_steps[metric] = max(point.step for point in points)
        self.run_id: str = run.info.run_id

    def send(self, records: Sequence[Record]) -> None:
        """Deliver ``records``, all of one kind.

        Raises:
            RejectedError: the server says that it can never accept them.
        """
        from mlflow.exceptions import RestException

        try:
            getattr(self, f"_send_{records[0]['kind']}")(records)
        except RestException as error:
            # Other codes are the network's, a gateway's or an overloaded server's: those are worth another attempt.
            if error.get_http_status_code() in (400, 404, 409, 413):
                raise RejectedError(str(error)) from error
            raise

    def _send_start(self, records: Sequence[Record]) -> None:
        self._client.update_run(self.run_id, status="RUNNING")
        self._join_parent()

    def _send_metrics(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, record["time"], record["step"])
            for record in records
            for key, value in record["values"].items()
            if record["step"] > self._known_steps.get(key, -1)
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def _send_params(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Param

        for record in records:
            self._client.log_batch(self.run_id, params=[Param(key, value) for key, value in record["values"].items()])

    def _send_tags(self, records: Sequence[Record]) -> None:
        for record in records:
            for key, value in record["values"].items():
                self._client.set_tag(self.run_id, key, value)

    def _send_artifact(self, records: Sequence[Record]) -> None:
        for record in records:
            path = Path(record["path"])
            if path.is_dir():
                target = "/".join(filter(None, [record["folder"], path.name]))
                self._client.log_artifacts(self.run_id, str(path), target)
            elif path.exists():
                self._client.log_artifact(self.run_id, str(path), record["folder"] or None)

    def _send_model(self, records: Sequence[Record]) -> None:
        for record in records:
            publish_model(self._client, self.run_id, record)

    def _send_finish(self, records: Sequence[Record]) -> None:
        self._join_parent()
        self._client.set_terminated(self.run_id, records[-1]["status"], records[-1]["time"])

    def _join_parent(self) -> None:
        """Hang the run under its parent if that is there by now; the sweep's own process makes it."""
        if self._parent is not None:
            parent = _find(self._client, self._experiment_id, key_text(self._parent))
            if parent is not None:
                self._client.set_tag(self.run_id, "mlflow.parentRunId", parent.info.run_id)
                self._parent = None


def publish_model(client: MlflowClient, run_id: str, record: Record) -> str:
    """Upload a model folder and register it; a version that this run already has under the name is used again."""
    from mlflow.exceptions import MlflowException

    name = record["name"]
    client.log_artifacts(run_id, record["path"], "model")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [version for version in client.search_model_versions(f"name='{name}'") if version.run_id == run_id]
    if known:
        number = known[0].version
        client.update_model_version(name, number, record["card"])
    else:
        # Of all requests the only one that must not be repeated: a second try would make a second version.
        with _request_timeout(300):
            number = client.create_model_version(
                name, f"runs:/{run_id}/model", run_id, description=record["card"], await_creation_for=0
            ).version
    client.set_registered_model_alias(name, record["alias"], number)
    return str(number)


@contextmanager
def _request_timeout(seconds: int) -> Iterator[None]:
    """Let requests take this long; mlflow reads its limit from the environment at each one."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(seconds)
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def run_pages(uri: str, experiment: str, key: Mapping[str, str]) -> tuple[str, str] | None:
    """Address of the run with ``key`` and of the page that compares its children; ``None`` if the server cannot say."""
    try:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        run = None if found is None else _find(client, found.experiment_id, key_text(key))
        if found is None or run is None:
            return None
        children = client.search_runs(
            [found.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", max_results=100
        )
        ids = ",".join(f"%22{child.info.run_id}%22" for child in children)
        page = f"{uri.rstrip('/')}/#"
        return (
            f"{page}/experiments/{found.experiment_id}/runs/{run.info.run_id}",
            f"{page}/compare-runs?runs=[{ids}]&experiments=[%22{found.experiment_id}%22]",
        )
    except Exception as error:
        log.warning("tracker address=unknown problem=%r", str(error)[:200])
        return None


def connect(uri: str) -> MlflowClient:
    """A client that gives up soon: the sender's own pauses are the retry."""
    # mlflow reads these at each request and offers no argument for them; what the user has set stays.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _experiment(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # The kind makes the page open on runs and charts; MLflow otherwise greets with its GenAI view.
            return str(client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:  # nobody else was faster either
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _find(client: MlflowClient, experiment_id: str, key: str) -> Any | None:
    runs = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return runs[0] if runs else None


def _last_start(spool: Spool) -> Record:
    """The newest start record: a run that was started again may have been told another address."""
    return [record for record in spool.records() if record["kind"] == "start"][-1]
