"""Cards on an MLflow run: one of its own (--mlflow-run), or that of the training run that made the model (--log)."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zsr.eval.card import ResultCard
    from zsr.tracking import RunTracker

_SPOOLS = ("mlflow-spool.jsonl", "metrics.jsonl")


def record_cards(tracker: RunTracker, cards: Sequence[tuple[Path, ResultCard]]) -> None:  # type: ignore[type-arg]
    """Cards as artifacts under ``cards/``, their numbers as metrics; what is there already is not recorded twice."""
    for path, card in sorted(cards, key=lambda pair: pair[1].created):
        moment = int(datetime.datetime.fromisoformat(card.created).timestamp())
        tracker.log_metrics(card_metrics(card), step=moment)
        tracker.log_artifact(path, "cards")
    tracker.finish("FINISHED")


def card_metrics(card: ResultCard) -> dict[str, float]:
    """``eval/<set>/clean`` and ``eval/<set>/<attack>-<eps>``, with the defence behind them if there is one."""
    from zsr.eval.plan import file_name

    behind = f"-behind-{card.defense.name}" if card.defense is not None else ""
    place = f"eval/{file_name(card.dataset.key)}"
    found = {f"{place}/clean{behind}": card.clean.value}
    if card.attack is not None and card.robust is not None:
        crafted = "" if card.attack.crafted_on == "served" else "-crafted"
        label = f"{card.attack.name}-{file_name(card.attack.eps_text)}{crafted}"
        found[f"{place}/{label}{behind}"] = card.robust.value
    return found


def own_tracker(name: str, label: str, digest: str, uri: str | None, folder: Path) -> RunTracker:  # type: ignore[type-arg]
    """The run of one model's evaluations.

    Raises:
        ValueError: no MLflow address is known.
    """
    from zsr.config.schema import TrackingConfig
    from zsr.tracking import make_tracker

    return make_tracker(
        TrackingConfig(name="mlflow", uri=uri),
        run_name=f"{name} {label}",
        key={"eval": name, "model": digest},
        folder=folder / "tracking" / f"{label}-{digest}",
        tags={"zsr.role": "evaluation"},
    )


def training_tracker(model: str, uri: str | None) -> RunTracker:  # type: ignore[type-arg]
    """The run that made a model, from the records in its folder.

    Raises:
        ValueError: the model is no run's folder, or the run was not tracked.
    """
    from zsr.cli.models import find_checkpoint
    from zsr.config.schema import TrackingConfig
    from zsr.tracking import make_tracker
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
            return make_tracker(
                tracked,
                run_name=start["name"],
                key=start["key"],
                parent=start["parent"],
                folder=spool.parent,
            )
    raise ValueError(f"--log: {checkpoint} belongs to no tracked run; name a run with --mlflow-run")
