"""Cards on an MLflow run: one of its own (--mlflow-run), or that of the training run that made the model (--log)."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsr.config.schema import TrackingConfig
    from zsr.eval.card import ResultCard
    from zsr.tracking import RunTracker

_SPOOLS = ("mlflow-spool.jsonl", "metrics.jsonl")
_SHORT = 6
"""Digits of a digest in a metric's name."""


def record_cards(tracker: RunTracker, cards: Sequence[tuple[Path, ResultCard]]) -> None:  # type: ignore[type-arg]
    """Cards as artifacts under ``cards/``, their numbers as metrics; what is there already is not recorded twice.

    A metric's step is the second in which its card was made, or the one after the metric's last where that is no later:
    trackers drop a step that they have seen, and the cards of several models, or of one second, may share a metric.
    """
    last: dict[str, tuple[int, float]] = {}
    for record in tracker.spool.records():
        if record["kind"] == "metrics":
            last |= {key: (record["step"], value) for key, value in record["values"].items()}
    for path, card in sorted(cards, key=lambda pair: pair[1].created):
        copy = tracker.folder / "artifacts" / "cards" / path.name
        if copy.is_file() and copy.read_bytes() == path.read_bytes():
            continue
        # Cards of several attacks repeat their clean accuracy.
        new = {key: value for key, value in card_metrics(card).items() if key not in last or last[key][1] != value}
        moment = int(datetime.datetime.fromisoformat(card.created).timestamp())
        step = max([moment, *(last[key][0] + 1 for key in new if key in last)])
        tracker.log_metrics(new, step=step)
        tracker.log_artifact(path, "cards")
        last |= {key: (step, value) for key, value in new.items()}
    tracker.finish("FINISHED")


def card_metrics(card: ResultCard) -> dict[str, float]:
    """The numbers of a card by metric, so that two numbers share a metric only if they may share a column of a table.

    ``eval/<set>/clean-<column>`` and ``eval/<set>/<attack>-<eps>-<column>``, with the seed if it is not 0 and the defence
    if there is one, then what was left ``-after-<stage>`` and the level of each check, ``-check-<id>``: 0 ok, 1 note, 2 warn,
    3 fail.
    """
    from zsr.attacks.checks import LEVELS
    from zsr.eval.card import column_id, digest_of
    from zsr.eval.plan import file_name

    behind = ""
    if card.defense is not None:
        behind = f"-behind-{card.defense.name}-{digest_of(card.defense.model_dump())[:_SHORT]}"
    seed = f"-seed{card.seed}" if card.seed else ""
    place = f"eval/{file_name(card.dataset.key)}"
    # Without a defence nothing is random in it.
    clean = f"{place}/clean-{column_id(card.protocol, card.dataset, None)[:_SHORT]}{seed if behind else ''}{behind}"
    found, label = {clean: card.clean.value}, clean
    if card.attack is not None and card.robust is not None:
        crafted = "" if card.attack.crafted_on == "served" else "-crafted"
        label = f"{place}/{card.attack.name}-{file_name(card.attack.eps_text)}{crafted}-{card.column[:_SHORT]}{seed}{behind}"
        found[label] = card.robust.value
        found |= {f"{label}-after-{file_name(stage)}": share.value for stage, share in card.survivors.items()}
    return found | {f"{label}-check-{finding.id}": float(LEVELS.index(finding.level)) for finding in card.checks}


def own_tracker(name: str, label: str, digest: str, uri: str | None, folder: Path) -> RunTracker:  # type: ignore[type-arg]
    """The run of one model's evaluations.

    Raises:
        ValueError: no MLflow address is known.
    """
    from zsr.config.schema import TrackingConfig
    from zsr.tracking import make_tracker
    from zsr.tracking.mlflow import mlflow_uri

    return make_tracker(
        TrackingConfig(name="mlflow", uri=uri),
        run_name=f"{name} {label}",
        key={"eval": name, "model": digest},
        folder=spool_folder(name, label, digest, mlflow_uri(uri), folder),
        tags={"zsr.role": "evaluation"},
    )


def spool_folder(name: str, label: str, digest: str, uri: str, folder: Path) -> Path:
    """Where what was recorded is kept: what one run was sent must not count as sent to another, nor to another server."""
    from zsr.eval.card import digest_of
    from zsr.eval.plan import file_name

    run = f"{file_name(name)}-{digest_of(name, uri)[:_SHORT]}"
    return folder / "tracking" / run / f"{file_name(label)}-{digest}"


def training_tracker(model: str, uri: str | None) -> RunTracker:  # type: ignore[type-arg]
    """The run that made a model, from the records in its folder.

    Raises:
        ValueError: the model is no run's folder, or the run was not tracked.
    """
    from zsr.tracking import make_tracker

    tracked, start, folder = _training_run(model, uri)
    return make_tracker(tracked, run_name=start["name"], key=start["key"], parent=start["parent"], folder=folder)


def check_tracking(models: Sequence[str], mlflow_run: str | None, log: bool, uri: str | None) -> None:
    """Find out before anything is measured whether there are runs to put it on.

    Raises:
        ValueError: MLflow has no address, a model that is to be logged is no tracked run, or an address is of no use.
    """
    from zsr.tracking.mlflow import mlflow_uri

    if mlflow_run is None and not log:
        if uri is not None:
            raise ValueError(f"--tracking-uri {uri}: nothing is put there without --mlflow-run or --log; add one")
        return
    asked = [] if mlflow_run is None else [(f"--mlflow-run {mlflow_run}", uri)]
    for model in models if log else ():
        tracked, _, _ = _training_run(model, uri)
        if tracked.name == "mlflow":
            asked.append(("--log", tracked.uri))
    for option, address in asked:
        try:
            mlflow_uri(address)
        except ValueError as error:
            raise ValueError(f"{option}: {error}; --tracking-uri says it here") from None


def _training_run(model: str, uri: str | None) -> tuple[TrackingConfig, dict[str, Any], Path]:
    """How a run was tracked, its first record, and where its records are."""
    from zsr.cli.models import find_checkpoint
    from zsr.config.schema import TrackingConfig
    from zsr.tracking.spool import read_records

    try:
        checkpoint = find_checkpoint(Path(model).expanduser())
    except ValueError:
        raise ValueError(f"--log: {model} is no run's folder; name a run with --mlflow-run") from None
    for run in (checkpoint, *list(checkpoint.parents)[:3]):
        for spool in (place / name for place in (run, run / "tracking") for name in _SPOOLS):
            start = next((record for record in read_records(spool) if record["kind"] == "start"), None)
            if start is None:
                continue
            tracked = TrackingConfig.model_validate(start["config"])
            if uri is not None:
                tracked = tracked.model_copy(update={"name": "mlflow", "uri": uri})
            return tracked, start, spool.parent
    raise ValueError(f"--log: {checkpoint} belongs to no tracked run; name a run with --mlflow-run")
