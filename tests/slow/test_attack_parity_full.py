"""AutoAttack against pyautoattack 0.2.0 with the authors' settings on a small classifier, and on the embedded CLIP.

What counts as noise: tests/parity.py. The embedded CLIP's labels are its own predictions, so that 200 images of the validation
concepts take part; steps, targets and queries are cut to what two CPU cores do in minutes.
"""

from __future__ import annotations

import pytest
import torch
from parity import assert_parity, assert_square_parity, our_verdicts, small_case, their_verdicts

from zsr.attacks.base import input_gradients_only
from zsr.config import ModelConfig
from zsr.data.pipeline import eval_batches
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import ZeroShotHead
from zsr.models import TextBank, load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


@pytest.mark.parametrize("stage", ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.2)])
def test_each_gradient_stage_agrees_at_the_authors_settings(stage, norm, eps):
    assert_parity(small_case(), (stage,), norm=norm, eps=eps)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.4)])
def test_square_agrees_within_the_spread_of_seeds(norm, eps):
    assert_square_parity(small_case(), norm, eps, queries=2000)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.2)])
def test_the_standard_cascade_agrees(norm, eps):
    assert_parity(small_case(), STANDARD, norm=norm, eps=eps, queries=1000)


def test_the_cascade_agrees_on_the_embedded_clip():
    model = load_model(ModelConfig(name="zsr:emoji-vit")).eval()
    shards = ShardSet("zsr:emoji/val")
    head = ZeroShotHead(model, TextBank(model), shards.classes, shards.templates[:1])
    (batch,) = eval_batches(shards, image_size=64, batch_size=200, num_samples=200)
    image_BCHW = batch.image.float() / 255
    settings = {"norm": "linf", "eps": 0.75 / 255, "steps": 30, "target_classes": 3, "queries": 200}
    with input_gradients_only(model.image):
        with torch.no_grad():
            label_B = head(image_BCHW).argmax(1)
        ours, other = (
            our_verdicts(head, image_BCHW, label_B, seed=seed, version="custom", attacks=STANDARD, **settings)
            for seed in range(2)
        )
        theirs = their_verdicts(head, image_BCHW, label_B, attacks=STANDARD, **settings)
    assert 0.05 < theirs.double().mean() < 0.95
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 1
    assert ((ours != theirs) & (ours == other)).sum() <= 1
