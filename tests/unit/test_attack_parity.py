"""Each stage of AutoAttack against an independent public implementation (pyautoattack 0.2.0), on 200 images.

The noise, stated: some verdicts hang on the random start. A sample is within noise if either implementation's own verdict on it
changes with the seed; on all others the two must agree, and mean counts must agree to one sample in 200 (tests/parity.py).
tests/slow/test_attack_parity_full.py has all nine targets, L2, the whole cascade and the embedded CLIP.
"""

from __future__ import annotations

import pytest
import torch
from parity import assert_parity, assert_square_parity, small_case

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("stage", "norm", "eps", "settings"),
    [
        ("apgd-ce", "linf", 0.02, {}),
        ("apgd-ce", "l2", 0.2, {"steps": 50}),
        ("apgd-dlr", "linf", 0.02, {"steps": 50}),
        ("apgd-t", "linf", 0.02, {"steps": 30, "target_classes": 2}),
        ("fab-t", "linf", 0.03, {"steps": 20, "target_classes": 2}),
    ],
)
def test_a_gradient_stage_agrees_with_the_public_implementation(stage, norm, eps, settings):
    assert_parity(small_case(), (stage,), norm=norm, eps=eps, **settings)


def test_square_agrees_within_the_spread_of_seeds():
    assert_square_parity(small_case(), "linf", 0.03, queries=200)
