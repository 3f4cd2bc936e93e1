"""Compare every objective: same model, data, steps and attack budget, each at its best of a small search, three seeds.

python sweeps/compare_objectives.py --dry-run
ray job submit --working-dir . -- python sweeps/compare_objectives.py --preset demo
"""

from __future__ import annotations

import sys

from zsr.launch.compare import Comparison, Measure, main

FAST, SLOW = "optim.lr=4e-3", "optim.lr=2e-3"
"""Every objective may have either: what separates them must not be the range of learning rates."""


def rates(*settings: str) -> tuple[tuple[str, ...], ...]:
    """Four learning rates, where there is nothing else to choose."""
    return tuple((*settings, rate) for rate in (FAST, SLOW, "optim.lr=3e-3", "optim.lr=1e-3"))


def strengths(strong: str, weak: str, *settings: str) -> tuple[tuple[str, ...], ...]:
    """Two learning rates, each with two strengths of what the objective adds to cross-entropy."""
    return tuple((*settings, rate, *strength.split()) for rate in (FAST, SLOW) for strength in (strong, weak))


def weights(**defaults: float) -> tuple[tuple[str, ...], ...]:
    """Strengths: the published or default weights, and a quarter of them."""
    strong, weak = (
        " ".join(f"objective.weight_{name}={value / part:g}" for name, value in defaults.items()) for part in (1, 4)
    )
    return strengths(strong, weak)


SETS = ("zsr:emoji/test_style", "zsr:emoji/test_concepts")
BUDGETS = ("1/255", "2/255", "4/255", "8/255")
APGD = {"name": "autoattack", "version": "custom", "attacks": ["apgd-ce", "apgd-t"], "steps": 40, "target_classes": 2}
"""AutoAttack's two strongest stages with fewer steps and targets: what two cores can do for all models in an hour."""
COMPARISON = Comparison(
    name="compare",
    preset="demo",
    # Four candidates each, so that none is tried harder than another.
    objectives={
        "clean": rates(),
        "tecoa": rates(),
        "tima": weights(takd=1.0, mhe=1.0, iakd=1.0),
        "tima/aaai26": tuple(("objective.variant=aaai26", *one) for one in weights(takd=1.0, mhe=1.0, iakd=1.0)),
        "tga_zsr": weights(ar=0.08, amc=0.05),
        "comp_tga": weights(ar=0.10, amc=0.07),
        "pmg_aft": weights(pretrained=1.0, clean=1.0),
        "fare": rates(),
        "caw": weights(confidence=1.0, features=1.0),
        "laat": strengths("objective.temperature=1", "objective.temperature=model"),
        "agft": strengths("objective.target_ratio=0.4", "objective.target_ratio=1"),
        "advcl": weights(contrast=1.0, pseudo=0.2),
        "regmix": weights(main=1.0, auxiliary=0.5, clean=1.0),
        "ccr_ccs": weights(ccr=1.0, ccs=1.0),
        "gsb": weights(kd=1.0),
        "tecoa/ram": strengths("model.attention_cap=0.3", "model.attention_cap=0.1"),
        "tecoa/expanded": rates("model.expand_text=true"),
    },
    settings=(
        "train.max_steps=64",
        "train.eval_every=0",
        "train.precision=bf16",
        "launch.workers=1",
        "attack.eps=4/255",
        "attack.steps=2",
        "attack.step_size=3/255",
        "eval.attack.eps=2/255",  # on held-out concepts little is left at 4/255 to choose by
        "eval.attack.step_size=1/510",
    ),
    search_settings=("train.max_steps=32",),  # half the steps tell candidates apart; the chosen ones are trained anew
    measures=(
        Measure(
            "robustness",
            sets=SETS,
            eps=BUDGETS,
            attacks={
                "PGD-20": {"name": "pgd", "steps": 20, "step_size_of_eps": 0.25, "best_iterate": True},
                "APGD": APGD,
            },
            defence={"name": "ttc"},
            num_samples=150,
        ),
        # Withstanding the whole cascade costs a quarter of a minute: few images of one seed, to see what APGD leaves.
        Measure(
            "AutoAttack",
            sets=SETS[:1],
            eps=BUDGETS[2:],
            attacks={"APGD": APGD, "AutoAttack": {"name": "autoattack", "version": "standard"}},
            num_samples=16,
            num_seeds=1,
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(main(COMPARISON))
