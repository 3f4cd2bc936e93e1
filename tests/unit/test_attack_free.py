"""What every registered attack gets tested without asking: ball, box, determinism, batches, no traces, no harm.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from zsr.attacks.base import Attack, input_gradients_only
from zsr.attacks.losses import margin
from zsr.attacks.noise import sample_seeds
from zsr.config import ATTACKS

torch.set_num_threads(1)

# Few steps, several restarts and targets: cheap, and every branch is taken.
CHEAP: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 4, "restarts": 2},
    "cw": {"steps": 4, "best_iterate": True},
    "apgd": {"steps": 9, "restarts": 2, "loss": "dlr-targeted", "target_classes": 2},
    "fab": {"steps": 6, "restarts": 2, "target_classes": 2},
    "square": {"queries": 30, "restarts": 2},
    "autoattack": {"steps": 5, "target_classes": 2, "queries": 12},
}
NAMES = [name for name in ATTACKS.names() if name != "adaptive"]  # takes a defended model: test_attack_adaptive.py
TRAINS = [name for name in NAMES if name in ("pgd", "apgd", "square")]


def build(name: str, eps: float = 0.02, **options: Any) -> Attack[Any]:
    config_class = ATTACKS.config_class(name)
    own = CHEAP.get(name, {}) | {"name": name, "eps": eps}
    if "step_size" in config_class.model_fields:
        own["step_size"] = eps / 2
    return ATTACKS.build(config_class.model_validate(own | options))


class Classifier(nn.Module):
    """Five classes from squares of pixels: smooth, and computed row by row so that batches cannot change it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        weight = torch.randn(2, 5, 3 * 6 * 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
        self.weight = nn.Parameter(weight)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        flat = image_BCHW.flatten(1) - 0.5
        return (flat[:, None] * self.weight[0] + flat.square()[:, None] * self.weight[1]).sum(-1)


def images(num: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Pixels in [0, 1], a good share of them exactly at an end."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((num, 3, 6, 6), dtype=dtype, generator=generator) * 1.3 - 0.15).clamp(0, 1)


def easy(num: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Classifier, Tensor, Tensor]:
    """A classifier, images, and as labels what it says."""
    model, image_BCHW = Classifier(dtype).requires_grad_(False), images(num, seed, dtype)
    return model, image_BCHW, model(image_BCHW).argmax(1)


NORM_EPS = st.sampled_from([("linf", 0.02), ("linf", 0.2), ("linf", 1.0), ("l2", 0.1), ("l2", 1.0), ("l2", 5.0)])


@pytest.mark.parametrize("name", NAMES)
@given(NORM_EPS, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**32))
@settings(max_examples=12)
def test_eps_and_the_pixel_range_are_never_exceeded_and_verdicts_are_true(name, norm_eps, dtype, seed):
    norm, eps = norm_eps
    model, image, label = easy(4, seed, dtype)
    found = build(name, norm=norm, eps=eps).attack_classifier(model, image, label, sample_seeds("abcd", seed))
    assert found.image_BCHW.min() >= 0 and found.image_BCHW.max() <= 1
    assert found.image_BCHW.shape == image.shape and found.image_BCHW.dtype == dtype
    delta = (found.image_BCHW.double() - image.double()).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.square().sum(1).sqrt()
    unit = torch.finfo(dtype).eps / 2 * (1 if norm == "linf" else delta.shape[1] ** 0.5)
    assert (size <= eps + 2 * unit).all()
    if found.success_B is not None:
        assert torch.equal(found.success_B, model(found.image_BCHW).argmax(1) != label)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_budget_is_the_identity(name, norm):
    model, image, label = easy(4)
    found = build(name, norm=norm, eps=0).attack_classifier(model, image, label, range(4))
    assert torch.equal(found.image_BCHW, image)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.3)])
def test_a_sample_is_attacked_the_same_way_in_any_batch_and_any_order(name, norm, eps):
    model, image, label = easy(7)
    label[5] = (label[5] + 1) % 5  # lost before it is attacked
    attack, seeds = build(name, norm=norm, eps=eps), sample_seeds("abcdefg", 0)

    def run(rows: list[int]) -> Tensor:
        return attack.attack_classifier(model, image[rows], label[rows], [seeds[row] for row in rows]).image_BCHW

    together, order = run(list(range(7))), [3, 6, 0, 5, 1, 4, 2]
    assert torch.equal(together, run(list(range(7))))
    assert torch.equal(together, torch.cat([run([row]) for row in range(7)]))
    assert torch.equal(together[order], run(order))
    other = attack.attack_classifier(model, image, label, sample_seeds("abcdefg", 1)).image_BCHW
    assert name == "fab" or not torch.equal(other, together)  # FAB's first start is the image itself


@pytest.mark.parametrize("name", NAMES)
@given(
    st.sampled_from([("linf", 0.01), ("linf", 0.03), ("l2", 0.1), ("l2", 0.3)]), st.integers(1, 60), st.integers(0, 99)
)
@settings(max_examples=10)
def test_attempts_in_one_batch_find_what_they_find_one_after_the_other(name, norm_eps, rows, seed):
    """Targets and restarts together, as many as a batch holds, in fewer calls."""
    model, image, label = easy(7, seed)
    label[5] = (label[5] + 1) % 5
    found, calls = [], []
    for most in (0, rows):
        counted: list[int] = []

        def count(x: Tensor, counted: list[int] = counted) -> Tensor:
            counted.append(len(x))
            return model(x)

        attack = build(name, norm=norm_eps[0], eps=norm_eps[1])
        for part in attack.parts:
            part.rows = most
        found.append(attack.attack_classifier(count, image, label, sample_seeds("abcdefg", seed)))
        calls.append(counted)
        assert max(counted) <= max(7, most)
    one, other = found
    assert torch.equal(one.image_BCHW, other.image_BCHW)
    assert torch.equal(one.zero_grad_B, other.zero_grad_B)
    assert (one.success_B is None) == (other.success_B is None)
    assert one.success_B is None or torch.equal(one.success_B, other.success_B)
    assert len(calls[1]) <= len(calls[0])
    if name in ("apgd", "fab") and not one.success_B[torch.arange(7) != 5].any() and rows >= 12:
        assert len(calls[1]) < len(calls[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0)])
def test_it_finds_adversarial_images_where_they_are_plenty(name, norm, eps):
    model, image, label = easy(30)
    with torch.no_grad():
        before_B = margin(model(image), label)
    found = build(name, norm=norm, eps=eps).attack_classifier(model, image, label, range(30))
    after_B = margin(model(found.image_BCHW), label)
    assert (after_B > 0).double().mean() > 0.5
    if name in ("cw", "fab", "square"):  # the others maximise something else than the margin
        assert ((after_B > 0) | (after_B >= before_B - 1e-9)).all()
    assert not found.zero_grad_B.any()


@pytest.mark.parametrize("name", ["pgd", "cw"])
@pytest.mark.parametrize("options", [{"best_iterate": True}, {"restarts": 3}])
def test_keeping_the_best_keeps_a_misclassified_image_before_one_of_higher_loss(name, options):
    def valley(image_BCHW: Tensor) -> Tensor:
        # One rival leads at brightness 0.5; past it cross-entropy rises with eight that come close and never lead.
        bright_B = image_BCHW.flatten(1).mean(1)
        rival_B, crowd_B = 0.1 - 100 * (bright_B - 0.5).square(), 20 * (bright_B - 0.61)
        return torch.stack([torch.zeros_like(bright_B), rival_B, *[crowd_B] * 8], dim=1)

    image, label = torch.full((4, 3, 6, 6), 0.45, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    alone = {"eps": 0.15, "steps": 3, "step_size": 0.05, "restarts": 1, "best_iterate": False}

    def wrong(**own: Any) -> Tensor:
        found = build(name, **alone | own).attack_classifier(valley, image, label, range(0, 40, 10))
        return valley(found.image_BCHW).argmax(1) != label

    assert wrong(steps=1).all()
    assert name == "cw" or not wrong().any()  # the margin turns back to the rival
    assert wrong(**options).all()


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.5)])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=8)
def test_any_loss_can_be_maximised_and_does_not_fall_below_the_start(name, norm, eps, seed):
    target = images(3, seed + 1)

    def loss(image_BCHW: Tensor) -> Tensor:
        return (torch.sin(9 * (image_BCHW - target)) + image_BCHW * target).flatten(1).sum(1)

    options = {"loss": "ce"} if name == "apgd" else {}
    attack = build(name, norm=norm, eps=eps, **options)
    image, seeds = images(3, seed), sample_seeds("abc", seed)
    found = attack.perturb(loss, image, seeds)
    alone = build(name, norm=norm, eps=eps, **options, **{"queries" if name == "square" else "steps": 0})
    assert (loss(found.image_BCHW) >= loss(alone.perturb(loss, image, seeds).image_BCHW) - 1e-9).all()
    assert (loss(found.image_BCHW) > loss(image)).any()
    assert torch.equal(found.image_BCHW, attack.perturb(loss, image, seeds).image_BCHW)
    half = build(name, norm=norm, eps=eps, **options, schedule={"name": "linear"}).perturb(loss, image, seeds, 0.5)
    assert torch.equal(
        half.image_BCHW,
        build(name, norm=norm, eps=eps / 2, **options).perturb(loss, image, seeds).image_BCHW,
    )


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(TRAINS)))
def test_attacks_on_logits_say_that_they_do_not_train(name):
    with pytest.raises(ValueError, match=f"attack.name={name}: needs the logits of a classifier"):
        build(name).perturb(lambda x: x.flatten(1).sum(1), images(2), [1, 2])


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_gradients_flags_modes_and_the_random_stream_as_they_were(name):
    model = nn.Sequential(Classifier(torch.float32), nn.Dropout(0.5)).train()
    image = images(3, dtype=torch.float32)
    label, before = model[0](image).argmax(1), image.clone()
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    with input_gradients_only(model):
        result = build(name, eps=0.02).attack_classifier(model, image, label, [1, 2, 3])
    assert not result.image_BCHW.requires_grad and not result.zero_grad_B.requires_grad
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(image, before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", NAMES)
def test_two_classes_and_an_empty_batch_are_no_trouble(name):
    model, image, _ = easy(4)
    two = lambda x: model(x)[:, :2]  # noqa: E731
    label = two(image).argmax(1)
    attack = build(name, eps=0.1)
    with (
        pytest.warns(UserWarning, match="needs 4 classes and there are 2")
        if name in ("apgd", "autoattack")
        else _calm()
    ):
        found = attack.attack_classifier(two, image, label, range(4))
    assert found.image_BCHW.shape == image.shape
    empty = attack.attack_classifier(model, image[:0], label[:0], [])
    assert empty.image_BCHW.shape == (0, 3, 6, 6) and empty.zero_grad_B.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_an_eps_in_grey_levels_is_rejected_with_the_fix(name):
    with pytest.raises(ValidationError, match=r"eps=4 is more than the whole pixel range \[0, 1\]; write 4/255"):
        build(name, eps=4)


def _calm() -> Any:
    import warnings

    return warnings.catch_warnings()
