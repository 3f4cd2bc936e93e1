"""The pieces of work of a comparison: train one run, measure one model. Each is a plain function of plain data.

They know nothing of Ray: a worker process calls them, and so does a test.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsr.config import RunConfig, validate
from zsr.launch.guard import find_flags


def train_job(
    tree: Mapping[str, Any], folder: str, key: Mapping[str, str], parent: Mapping[str, str]
) -> dict[str, Any]:
    """Train one configuration in this process, going on from its last checkpoint if it was begun.

    Args:
        tree: all settings, as plain data.
        folder: of the run, seen by all workers.
        key, parent: of the run and of the comparison in the tracker.

    Returns:
        ``metrics`` (of the quick evaluation), ``seconds`` of training, ``checkpoint`` and ``flags``; a run whose loss
        ceased to be finite has ``diverged`` and no checkpoint.
    """
    import torch

    from zsr.engine.loop import Diverged, train
    from zsr.engine.session import LocalSession
    from zsr.tracking import make_tracker
    from zsr.tracking.record import record_end, record_start

    config = validate(dict(tree))
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    root = Path(folder)
    session = LocalSession(root, keep=1)
    tracker = make_tracker(config.tracking, run_name=config.name, key=key, parent=parent, folder=root / "tracking")
    record_start(tracker, config, {})
    try:
        result = train(config, session, tracker)
    except Diverged as fault:
        tracker.finish("FAILED")
        return {"diverged": str(fault), "metrics": {}, "flags": ["diverged"], "seconds": 0.0}
    except BaseException:
        tracker.finish("FAILED")
        raise
    record_end(tracker, result.metrics)
    tracker.finish("FINISHED")
    for unfinished in root.glob("unfinished-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    return {
        "metrics": result.metrics,
        "flags": find_flags(result.metrics),
        "seconds": result.elapsed_s,
        "checkpoint": str(session.saved()[-1]),
    }


def measure_job(checkpoint: str | None, tree: Mapping[str, Any], measure: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a trained model, or the untouched one, on every set: clean and attacked, bare and with the defence.

    Args:
        checkpoint: folder, or None for the model that ``tree`` starts from.
        tree: settings of the run.
        measure: what :class:`zsr.launch.compare.Measure` holds, as plain data.

    Returns:
        ``sets``: by address, ``chance``, ``clean``, ``robust`` and ``zero_grad_frac`` by attack and budget, ``findings`` of the
        checks that warn or fail, and ``defended`` with the same where a defence was asked for; all shares in [0, 1].
        ``seconds``.
    """
    import torch

    from zsr.data.shards import ShardSet
    from zsr.engine.checkpoint import load_trained
    from zsr.eval import evaluate_sets
    from zsr.models import load_model

    began = time.monotonic()
    config: RunConfig = validate(dict(tree))
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    model = load_model(config.model) if checkpoint is None else load_trained(Path(checkpoint))[0]
    model.eval()
    rows = evaluate_sets(
        model,
        [ShardSet(address, config.data.cache_dir) for address in measure["sets"]],
        _attacks(measure),
        template=config.data.template,
        num_samples=measure["num_samples"],
        batch_size=config.eval.batch_size,
        seed=measure["seed"],
        defended=_defended(measure, model, config, checkpoint is None),
    )
    sets: dict[str, dict[str, Any]] = {}
    for row in rows:
        numbers = {
            "chance": row.chance,
            "samples": row.clean.num_samples,
            "clean": row.clean.value,
            "robust": {label: accuracy.value for label, accuracy in row.robust.items()},
            "zero_grad_frac": dict(row.zero_grad_frac),
            "findings": [finding.model_dump(mode="json") for finding in row.doubts],
        }
        if row.defense is None:
            sets[row.data] = numbers
        else:
            sets[row.data]["defended"] = numbers
    return {"sets": sets, "seconds": time.monotonic() - began}


def _attacks(measure: Mapping[str, Any]) -> dict[str, Any]:
    from zsr.config import ATTACKS
    from zsr.config.base import parse_fraction

    attacks = {}
    for label, common in measure["attacks"].items():
        for eps in measure["eps"]:
            settings = dict(common)
            if "step_size_of_eps" in settings:
                settings["step_size"] = float(parse_fraction(eps)) * settings.pop("step_size_of_eps")
            config = ATTACKS.config_class(settings["name"]).model_validate({**settings, "eps": eps})
            attacks[f"{label} {eps}"] = ATTACKS.build(config)
    return attacks


def _defended(measure: Mapping[str, Any], model: Any, config: RunConfig, untouched: bool) -> Any:
    if measure["defence"] is None:
        return None
    from zsr.config import DEFENSES
    from zsr.eval.defended import DefendedCLIP
    from zsr.models import load_model

    config_class = DEFENSES.config_class(measure["defence"]["name"])
    defence = DEFENSES.build(config_class.model_validate(measure["defence"]))
    return DefendedCLIP(model, defence, frozen=None if untouched else load_model(config.model).image.pretrained_copy())
