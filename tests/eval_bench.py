"""What tests of evaluation share: a scene of the tiny CLIP on small shards, and its verdicts as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zsr.attacks.autoattack import AutoAttack, AutoAttackConfig
from zsr.config import ModelConfig
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import ZeroShotHead
from zsr.eval.images import Images
from zsr.eval.ledger import Ledger
from zsr.eval.runner import Clean, Crew, Verdicts, classify_clean, run_attack
from zsr.eval.scene import Scene
from zsr.eval.target import plain_target
from zsr.models import TextBank, load_model

SEED = 3


def make_scene(model_name: str, shards: Path | str, pixels: int = 32, num_samples: int = 0, **settings: Any) -> Scene:
    """The bare model on a set; at ``pixels`` epsilon applies."""
    model, found = load_model(ModelConfig(name=model_name, **settings)).eval(), ShardSet(shards)
    head = ZeroShotHead(model, TextBank(model), found.classes, found.templates[:1])
    return Scene(Images(found, pixels, num_samples), plain_target(head), found.classes, device="cpu", seed=SEED)


def cascade(eps: str = "1/255", **settings: Any) -> AutoAttack:
    """AutoAttack with a few steps of each stage."""
    return AutoAttack(AutoAttackConfig(eps=eps, **{"steps": 3, "queries": 12, "target_classes": 2, **settings}))


def run_cascade(
    scene: Scene, attack: AutoAttack, batch_size: int = 16, crew: Crew | None = None
) -> tuple[Clean, Verdicts]:
    """Clean predictions and the attack's verdicts, in memory."""
    ledgers = {name: Ledger(None, "") for name in scene.target.judges}
    clean = classify_clean(scene, ledgers, batch_size=batch_size, crew=crew)
    return clean, run_attack(scene, attack, clean, Ledger(None, ""), batch_size=batch_size, crew=crew)


def plain(clean: Clean, verdicts: Verdicts) -> dict[str, list[Any]]:
    """Every verdict, as lists that ``==`` compares."""
    return {
        "clean": clean.pred["bare"].tolist(),
        "attacked": verdicts.pred["bare"].tolist(),
        "stage": verdicts.stage.tolist(),
        "zero_grad": verdicts.zero_grad.tolist(),
    }
