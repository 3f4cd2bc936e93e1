"""Search TIMA's weights, its margin, the epsilon schedule and the learning rate.

python sweeps/tima_sweep.py --dry-run
ray job submit --working-dir . -- python sweeps/tima_sweep.py --num-trials 64 --workers-per-trial 4
ray job submit --working-dir . -- python sweeps/tima_sweep.py --preset demo
"""

from __future__ import annotations

import sys

import optuna

from zsr.config import RunConfig
from zsr.launch.strong import BRIEF_FINALISTS
from zsr.launch.sweep import Sweep, Variant, main


def space(trial: optuna.trial.BaseTrial, base: RunConfig) -> dict[str, object]:
    """Weights over one or two decades, a margin of either sign, and a learning rate around the preset's."""
    margin = trial.suggest_float("margin", -0.2, 0.2)
    return {
        "objective.weight_tam": trial.suggest_float("weight_tam", 0.3, 3.0, log=True),
        "objective.weight_mhe": trial.suggest_float("weight_mhe", 0.1, 10.0, log=True),
        "objective.weight_iakd": trial.suggest_float("weight_iakd", 0.1, 5.0, log=True),
        "objective.weight_takd": trial.suggest_float("weight_takd", 0.1, 5.0, log=True),
        "objective.margin_base": trial.suggest_float("margin_base", 0.0, 0.2),
        # One signed axis instead of a size and a sign: around zero the sign means nothing, and the sampler can see that.
        "objective.margin_scale": abs(margin),
        "objective.margin_sign": "distant" if margin >= 0 else "similar",
        "attack.schedule": trial.suggest_categorical("schedule", ["constant", "linear", "cosine", "warmup"]),
        "optim.lr": base.optim.lr * trial.suggest_float("lr_factor", 0.3, 3.0, log=True),
    }


FIRST = {  # the objective's own defaults
    "weight_tam": 1.0,
    "weight_mhe": 1.0,
    "weight_iakd": 1.0,
    "weight_takd": 1.0,
    "margin_base": 0.0,
    "margin": 0.05,
    "schedule": "constant",
    "lr_factor": 1.0,
}

SWEEP = Sweep(
    name="tima",
    preset="tima-vit-b32-tinyimagenet",
    space=space,
    settings=("objective=tima",),
    num_trials=64,
    first=[FIRST],
    # Four trials are too few to stop any early; a trade-off curve says more.
    variants={
        "demo": Variant(
            num_trials=4,
            multi_objective=True,
            step_s=1.5,
            test_sets=("zsr:emoji/test_style", "zsr:emoji/test_concepts"),
            finalists=BRIEF_FINALISTS,
        )
    },
)

if __name__ == "__main__":
    sys.exit(main(SWEEP))
