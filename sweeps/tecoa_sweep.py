"""Search the settings of TeCoA, the baseline: learning rate, weight decay, and how the attack of training is set.

python sweeps/tecoa_sweep.py --dry-run
ray job submit --working-dir . -- python sweeps/tecoa_sweep.py --num-trials 32
ray job submit --working-dir . -- python sweeps/tecoa_sweep.py --preset demo
"""

from __future__ import annotations

import sys

import optuna

from zsr.config import RunConfig
from zsr.launch.strong import BRIEF_FINALISTS
from zsr.launch.sweep import Sweep, Variant, main


def space(trial: optuna.trial.BaseTrial, base: RunConfig) -> dict[str, object]:
    """A learning rate around the preset's, and a stronger or weaker attack within the preset's epsilon."""
    steps = trial.suggest_int("steps", 1, 5)
    return {
        "optim.lr": base.optim.lr * trial.suggest_float("lr_factor", 0.1, 10.0, log=True),
        "optim.weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
        "attack.steps": steps,
        # In all, the steps can cross the ball about once to three times.
        "attack.step_size": base.attack.eps * trial.suggest_float("reach", 1.0, 3.0) / steps,
        "attack.schedule": trial.suggest_categorical("schedule", ["constant", "linear", "cosine", "warmup"]),
    }


SWEEP = Sweep(
    name="tecoa",
    preset="tecoa-vit-b32-tinyimagenet",
    space=space,
    settings=("objective=tecoa",),
    num_trials=32,
    first=[{"lr_factor": 1.0, "weight_decay": 1e-4, "steps": 2, "reach": 1.5, "schedule": "constant"}],
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
