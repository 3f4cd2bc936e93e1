"""What a sweep's finalists go through: a strong attack and the probes on the validation set. Knows nothing of the sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsr.config import ATTACKS, RunConfig

STRONG = "val/strong_acc"
"""Robust accuracy of a finalist, under the strong attack."""
APGD_PAIR = {"name": "autoattack", "version": "custom", "attacks": ("apgd-ce", "apgd-t")}


@dataclass(frozen=True)
class Finalists:
    """Which trials are measured again, and how.

    Attributes:
        count: trials that must pass, the next trial in place of one that does not; 0 leaves the choice to the cheap attack.
        num_samples: of the validation set, the head of its fixed order; 0 takes all.
        attack: settings of the strong attack; norm and eps are those of ``eval.attack``.
    """

    count: int = 2
    num_samples: int = 256
    attack: Mapping[str, Any] = field(default_factory=lambda: dict(APGD_PAIR))

    def attack_config(self, config: RunConfig) -> Any:
        """The strong attack at the sweep's own budget.

        Raises:
            ValueError: no attack has that name, or a setting is wrong.
        """
        weak = config.eval.attack
        budget = {name: getattr(weak, name) for name in ("norm", "eps") if hasattr(weak, name)}
        return ATTACKS.config_class(self.attack["name"]).model_validate({**self.attack, **budget})


BRIEF_FINALISTS = Finalists(num_samples=0, attack={**APGD_PAIR, "steps": 20, "target_classes": 3})
"""For a few hundred validation images and a few cores: a fifth of the steps, a third of the targets."""


def strong_job(checkpoint: str, tree: Mapping[str, Any], finalists: Finalists) -> dict[str, float]:
    """Measure one checkpoint, given by its address, on the validation set that ``tree`` names.

    Returns:
        ``val/strong_acc`` and ``val/check/<id>`` of the cheap checks under the strong attack and of the probes.

    Raises:
        ValueError, OSError: checkpoint or set cannot be read.
    """
    import torch
    from ray.train import Checkpoint

    from zsr.config import validate
    from zsr.engine.checkpoint import load_trained

    config = validate(dict(tree))
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    with Checkpoint(checkpoint).as_directory() as local:
        model, _ = load_trained(Path(local), "cuda" if torch.cuda.is_available() else "cpu")
    return strong_metrics(model, config, finalists)


def strong_metrics(model: Any, config: RunConfig, finalists: Finalists) -> dict[str, float]:
    """What :func:`strong_job` returns, for a model in hand."""
    from zsr.attacks.base import input_gradients_only
    from zsr.attacks.checks import Facts, metrics_of
    from zsr.data.shards import ShardSet
    from zsr.engine.quick_eval import ZeroShotHead, attack_seeds, evaluate
    from zsr.eval.probes import Sample, probe
    from zsr.models import TextBank

    shards = ShardSet(config.data.val, config.data.cache_dir)
    template = config.data.template
    head = ZeroShotHead(
        model, TextBank(model), shards.classes, shards.templates[:1] if template is None else [template]
    )
    attack = ATTACKS.build(finalists.attack_config(config))
    sample = Sample()
    result = evaluate(
        head, shards, attack, num_samples=finalists.num_samples, batch_size=config.eval.batch_size, seed=config.seed,
        watch=sample.see,
    )  # fmt: skip
    findings = list(result.findings)
    taken = sample.take()
    if taken is not None:
        image_BCHW, label_B, keys, broken_B = taken
        facts = Facts(shards.classes, eps=attack.threat().eps, norm=attack.config.norm)
        with input_gradients_only(model.image), model.image.hiding_columns(config.seed):
            findings += probe(head, attack, image_BCHW, label_B, attack_seeds(keys, config.seed), broken_B, facts)
    assert result.robust_acc is not None
    return {STRONG: result.robust_acc, **metrics_of(findings)}
