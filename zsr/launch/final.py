"""The last word of a sweep: its best model against the untouched one, on sets that took no part in choosing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zsr.config import ATTACKS, ModelConfig
from zsr.data.shards import ShardSet
from zsr.eval import Accuracy, EvalRow, evaluate_sets
from zsr.launch.plan import Plan
from zsr.models import load_model

UNTOUCHED, BEST = "untouched", "best trial"
HEADER = ["model", "set", "images", "chance %", "clean %", "robust %", "checks"]


@dataclass(frozen=True)
class Final:
    """How the best trial is compared.

    Attributes:
        sets: addresses of test sets.
        num_samples: of each; 0 takes all.
    """

    sets: tuple[str, ...]
    num_samples: int = 0


@dataclass(frozen=True)
class Comparison:
    """Rows of both models, by :data:`UNTOUCHED` and :data:`BEST`; the attack is the sweep's own evaluation attack."""

    attack: str
    results: Mapping[str, list[EvalRow]]

    def rows(self) -> list[list[str]]:
        """Cells under :data:`HEADER`, a set's two models below each other; accuracies with their 95 % interval.

        The last one names the checks that warn or fail, which says that a robust number is not to be believed.
        """
        body = []
        for pair in zip(*self.results.values(), strict=True):
            for model, row in zip(self.results, pair, strict=True):
                body.append(
                    [
                        model,
                        row.data,
                        str(row.clean.num_samples),
                        f"{100 * row.chance:.1f}",
                        _cell(row.clean),
                        _cell(row.robust[self.attack]),
                        ", ".join(f"{finding.level}: {finding.id}" for finding in row.doubts) or "none raised",
                    ]
                )
        return body

    def metrics(self) -> dict[str, float]:
        """Numbers for the tracker, the best trial's alone: ``eval/<set>/clean`` and ``eval/<set>/robust``."""
        found: dict[str, float] = {}
        for row in self.results[BEST]:
            name = row.data.removeprefix("zsr:").strip("/").replace("/", "-").replace(":", "-")
            found |= {f"eval/{name}/clean": row.clean.value, f"eval/{name}/robust": row.robust[self.attack].value}
        return found


def compare(final: Final, plan: Plan, best_model: Path) -> Comparison:
    """Evaluate both models on every set, in this process, with progress on the screen.

    Args:
        best_model: folder in open_clip's format.

    Raises:
        ValueError, OSError: a set or a model cannot be loaded.
    """
    config = plan.config
    attack = ATTACKS.build(config.eval.attack)
    label = f"{config.eval.attack.name}-{getattr(config.eval.attack, 'steps', '')}"
    sets = [ShardSet(address, config.data.cache_dir) for address in final.sets]
    untouched = config.model.model_copy(
        update={"adapt": "weights", "attention_cap": 0.0, "attention_drop": 0.0, "expand_text": False}
    )
    models = {UNTOUCHED: untouched, BEST: ModelConfig(name=f"local-dir:{best_model}")}
    results = {}
    for name, model_config in models.items():
        print(f"stage=final model={name.replace(' ', '_')} sets={','.join(final.sets)}", flush=True)
        results[name] = evaluate_sets(
            load_model(model_config),
            sets,
            {label: attack},
            template=config.data.template,
            num_samples=final.num_samples,
            batch_size=config.eval.batch_size,
            seed=config.seed,
        )
        for row in results[name]:
            for finding in row.doubts:
                print(
                    f"stage=final model={name.replace(' ', '_')} set={row.data} check={finding.id} level={finding.level} "
                    f"reason={finding.sentence!r}",
                    flush=True,
                )
    return Comparison(label, results)


def _cell(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{100 * accuracy.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
