"""Compare every objective: same model, data, steps and attack budget, each at its best of a small search, three seeds.

python sweeps/compare_objectives.py --dry-run
ray job submit --working-dir . -- python sweeps/compare_objectives.py --preset demo
"""

from __future__ import annotations

import sys

from zsr.launch.compare import Comparison, Measure, main

RATES = ("optim.lr=2e-3", "optim.lr=5e-4")


def candidates(**weights: tuple[float, float]) -> tuple[tuple[str, ...], ...]:
    """Four settings for each objective: two learning rates, and two strengths of what it adds to cross-entropy.

    Where there is nothing to weigh, four learning rates: every objective gets the same number of attempts.
    """
    if not weights:
        return tuple((f"optim.lr={rate}",) for rate in ("4e-3", "2e-3", "1e-3", "5e-4"))
    strengths = [tuple(f"objective.{name}={values[i]}" for name, values in weights.items()) for i in (0, 1)]
    return tuple((rate, *strength) for rate in RATES for strength in strengths)


COMPARISON = Comparison(
    name="compare",
    preset="demo",
    objectives={
        "clean": candidates(),
        "tecoa": candidates(),
        "tima": candidates(weight_takd=(1.0, 0.25), weight_mhe=(1.0, 0.25), weight_iakd=(1.0, 0.25)),
    },
    # Half the steps tell candidates apart; the chosen ones are trained anew.
    settings=(
        "train.max_steps=48",
        "train.eval_every=0",
        "launch.workers=1",
        "attack.steps=2",
        "attack.step_size=3/255",
    ),
    search_settings=("train.max_steps=24",),
    measure=Measure(
        sets=("zsr:emoji/test_style", "zsr:emoji/test_concepts"),
        eps=("1/255", "2/255", "4/255", "8/255"),
        attack={"name": "pgd", "steps": 20, "step_size_of_eps": 0.25, "restarts": 2, "best_iterate": True},
        defence={"name": "ttc"},
        num_samples=200,
    ),
)

if __name__ == "__main__":
    sys.exit(main(COMPARISON))
