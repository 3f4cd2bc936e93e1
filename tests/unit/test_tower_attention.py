"""RAM's attention against its formula in plain loops, and the promises about its random part.

Shapes: B images, L tokens of a sequence, E width inside the tower, h heads.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tower_tokens import VITS, build, make_pixels, resnet, tower_of
from tiny_clip import tiny_clip, write_tiny_clip
from torch import Tensor, nn

from zsr.config import ModelConfig
from zsr.models import ImageTower, RobustCLIP, export_open_clip, load_model
from zsr.models.attention import ContiguousAttention, use_fast_attention
from zsr.models.robust_attention import DEFAULT_SEED, HiddenColumns, RobustAttention

WIDTH, HEADS, LENGTH = 12, 3, 7


def robust(cap: float = 0.0, drop: float = 0.0, kind: str = "average", precision: Any = "fp32") -> ImageTower:
    tower = tower_of(build(VITS[kind]), precision)
    tower.equip(ModelConfig(attention_cap=cap, attention_drop=drop))
    if drop:
        hide(tower, DEFAULT_SEED)
    return tower.eval()


def hide(tower: ImageTower, seed: int) -> None:
    """What ``hiding_columns`` does, for good."""
    assert tower.columns is not None
    tower.columns.active = True
    tower.columns.reseed(seed)


def layer(cap: float, columns: HiddenColumns | None = None) -> Any:
    torch.manual_seed(3)
    module: Any = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    nn.init.normal_(module.in_proj_weight, std=0.7)
    nn.init.normal_(module.in_proj_bias)
    module.cap, module.columns, module.__class__ = cap, columns, RobustAttention
    if columns is not None:
        columns.active = True
    return module


@torch.no_grad()
def by_hand(module: Any, x_LE: Tensor, cap: float, hidden: list[int]) -> Tensor:
    """One image, one head, one query and one key at a time, in float64."""
    size = WIDTH // HEADS
    q, k, v = (x_LE.double() @ module.in_proj_weight.double().T + module.in_proj_bias.double()).split(WIDTH, dim=1)
    mixed = torch.zeros(len(x_LE), WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for query in range(len(x_LE)):
            logits = [float(q[query, part] @ k[key, part]) / math.sqrt(size) for key in range(len(x_LE))]
            powers = [math.exp(logit) for logit in logits]
            weights = [min(power / sum(powers), cap or 1.0) for power in powers]
            weights = [0.0 if key in hidden else weight for key, weight in enumerate(weights)]
            for key, weight in enumerate(weights):
                mixed[query, part] += weight / sum(weights) * v[key, part]
    return mixed @ module.out_proj.weight.double().T + module.out_proj.bias.double()


@pytest.mark.parametrize("cap", [0.0, 1.0, 0.3, 0.15, 0.01])
@pytest.mark.parametrize("drop", [0.0, 0.4])
@torch.no_grad()
def test_attention_equals_the_formula_in_loops(cap, drop):
    columns = HiddenColumns(drop) if drop else None
    module, x_BLE = layer(cap, columns), torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    hidden = copy.deepcopy(columns).draw(LENGTH).nonzero()[:, 0].tolist() if columns else []
    found, weights = module(x_BLE, x_BLE, x_BLE, need_weights=False)
    assert weights is None and len(hidden) == (2 if drop else 0)  # 40 % of the six columns after the class token
    for x_LE, found_LE in zip(x_BLE, found, strict=True):
        assert torch.allclose(found_LE.double(), by_hand(module, x_LE, cap, hidden), rtol=1e-5, atol=1e-5)


def test_the_cap_matters_at_the_values_tested_above():
    """Otherwise the loops above would agree with anything."""
    x_LE = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    plain, capped, uniform = (by_hand(layer(0), x_LE, cap, []) for cap in (0.0, 0.3, 1e-40))
    assert (plain - capped).abs().max() > 0.05 and (capped - uniform).abs().max() > 0.05
    assert torch.allclose(uniform, uniform[:1].expand_as(uniform))


@pytest.mark.parametrize("kind", [kind for kind in VITS if kind != "normalised queries"])
def test_a_cap_of_one_is_plain_attention_forward_and_backward(kind):
    visual = build(VITS[kind])
    pixels = make_pixels(visual).requires_grad_(True)
    expected = tower_of(visual)(pixels, tokens=True)
    (wanted,) = torch.autograd.grad(expected.raw_BD.sum(), pixels)
    found = robust(cap=1.0, kind=kind)(pixels, tokens=True)
    (gradient,) = torch.autograd.grad(found.raw_BD.sum(), pixels)
    assert torch.allclose(found.raw_BD, expected.raw_BD, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.tokens_BPD, expected.tokens_BPD, rtol=1e-5, atol=1e-5)
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


@torch.no_grad()
def test_in_bf16_it_is_near_fp32():
    exact, found = (
        robust(0.2, 0.3, precision=precision)(make_pixels(build(VITS["average"]))) for precision in ("fp32", "bf16")
    )
    assert found.raw_BD.dtype == torch.float32 and not torch.equal(found.raw_BD, exact.raw_BD)
    assert (found.embed_BD * exact.embed_BD).sum(1).min() > 0.99


@torch.no_grad()
def test_attention_that_lies_on_hidden_columns_alone_stays_finite():
    module, x_BLE = layer(0.0, HiddenColumns(0.99)), torch.zeros(1, LENGTH, WIDTH)
    x_BLE[:, 1:] = 100 * torch.randn(LENGTH - 1, WIDTH, generator=torch.Generator().manual_seed(0))
    found, _ = module(x_BLE, x_BLE, x_BLE, need_weights=False)
    assert found.isfinite().all()


# The random part.


@given(st.integers(2, 300), st.floats(0.001, 0.999), st.integers(0, 2**31))
def test_the_share_is_hidden_and_the_class_token_never(length, share, seed):
    columns = HiddenColumns(share)
    columns.reseed(seed)
    hidden_L = columns.draw(length)
    assert not hidden_L[0]
    assert hidden_L.sum() == max(1, round(share * (length - 1)))


def test_every_other_column_is_hidden_at_times():
    columns = HiddenColumns(0.25)
    counts = torch.stack([columns.draw(9) for _ in range(400)]).float().mean(dim=0)
    assert counts[0] == 0
    assert (counts[1:] - 0.25).abs().max() < 0.1  # four standard deviations of a share of 400 draws: 0.087


@torch.no_grad()
def test_reseeding_repeats_the_draws_and_other_passes_differ():
    tower = robust(drop=0.3)
    pixels = make_pixels(tower.visual)
    first, second = tower(pixels).raw_BD, tower(pixels).raw_BD
    assert not torch.allclose(first, second, atol=1e-4)
    hide(tower, 0)
    assert torch.equal(tower(pixels).raw_BD, first)  # the seed it starts with
    hide(tower, 7)
    other = tower(pixels).raw_BD
    assert not torch.allclose(other, first, atol=1e-4)
    hide(tower, 7)
    assert torch.equal(tower(pixels).raw_BD, other)


@torch.no_grad()
def test_the_global_random_stream_is_neither_read_nor_moved():
    tower = robust(drop=0.3)
    pixels = make_pixels(tower.visual)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tower(pixels).raw_BD
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    hide(tower, 0)
    assert torch.equal(tower(pixels).raw_BD, first)


@torch.no_grad()
def test_columns_are_the_same_for_the_whole_batch():
    tower = robust(drop=0.3)
    pixels = make_pixels(tower.visual, num=3)
    together = tower(pixels).raw_BD
    for place in range(3):
        hide(tower, 0)
        assert torch.allclose(tower(pixels[place : place + 1]).raw_BD[0], together[place], rtol=1e-4, atol=1e-5)


def test_columns_are_hidden_only_where_it_is_asked_for_and_from_the_seed_on():
    visual = build(VITS["average"])
    pixels = make_pixels(visual)
    plain = tower_of(visual)(pixels).raw_BD
    tower = tower_of(copy.deepcopy(visual))
    tower.equip(ModelConfig(attention_drop=0.3))
    for mode in (True, False):
        assert torch.allclose(tower.train(mode)(pixels).raw_BD, plain, rtol=1e-5, atol=1e-5)
    with tower.hiding_columns(4):
        first = tower(pixels).raw_BD
        with tower.hiding_columns(5):
            other = tower(pixels).raw_BD
        assert not torch.allclose(tower(pixels).raw_BD, plain, atol=1e-4)  # still hidden after the inner one
    assert not torch.allclose(first, plain, atol=1e-4) and not torch.allclose(first, other, atol=1e-4)
    assert torch.allclose(tower(pixels).raw_BD, plain, rtol=1e-5, atol=1e-5)
    with tower.hiding_columns(4):
        assert torch.equal(tower(pixels).raw_BD, first)


@torch.no_grad()
def test_a_copy_has_a_stream_of_its_own_shared_by_its_blocks():
    tower = robust(drop=0.3)
    pixels = make_pixels(tower.visual)
    tower(pixels)
    twin = copy.deepcopy(tower)
    assert torch.equal(twin(pixels).raw_BD, tower(pixels).raw_BD)
    hide(twin, 5)
    twin(pixels)
    hide(tower, 5)
    tower(pixels)
    streams = {id(module.columns) for module in twin.modules() if isinstance(module, RobustAttention)}
    assert streams == {id(twin.columns)} and twin.columns is not tower.columns
    assert torch.equal(twin(pixels).raw_BD, tower(pixels).raw_BD)


@torch.no_grad()
def test_without_randomness_hiding_changes_nothing():
    tower = robust(cap=0.5)
    pixels = make_pixels(tower.visual)
    before = tower(pixels).raw_BD
    with tower.hiding_columns(3):
        assert tower.columns is None and torch.equal(tower(pixels).raw_BD, before)


# In a model.


def load(folder: Path, **options: Any) -> RobustCLIP:
    return load_model(ModelConfig(name=write_tiny_clip(folder), **options)).eval()


@pytest.mark.parametrize("fast", [True, False])
@torch.no_grad()
def test_only_the_image_tower_changes_and_a_teacher_has_plain_attention(tmp_path, fast):
    plain = load(tmp_path, fast_layers=fast)
    model = load(tmp_path, attention_cap=0.05, attention_drop=0.3, fast_layers=fast)
    changed = [name for name, module in model.open_clip.named_modules() if isinstance(module, RobustAttention)]
    assert changed == [f"visual.transformer.resblocks.{block}.attn" for block in range(2)]
    assert list(model.open_clip.state_dict()) == list(plain.open_clip.state_dict())
    pixels = torch.rand(2, 3, 32, 32)
    expected = plain.encode_image(pixels).raw_BD
    assert not torch.allclose(model.encode_image(pixels).raw_BD, expected, atol=1e-3)
    teacher = model.image.pretrained_copy()
    assert torch.equal(teacher(pixels).raw_BD, expected)
    own = ContiguousAttention if fast else nn.MultiheadAttention
    assert {type(module) for module in teacher.modules() if isinstance(module, nn.MultiheadAttention)} == {own}
    assert isinstance(model.image.visual.transformer.resblocks[0].attn, RobustAttention)


def test_faster_attention_asked_for_afterwards_leaves_it_alone(tmp_path):
    model = load(tmp_path, attention_cap=0.5, fast_layers=False)
    use_fast_attention(model)
    assert isinstance(model.image.visual.transformer.resblocks[0].attn, RobustAttention)


@torch.no_grad()
def test_weights_pass_between_a_model_with_it_and_one_without(tmp_path):
    model, plain = load(tmp_path, attention_cap=0.05), tiny_clip(tmp_path).eval()
    for parameter in model.image.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    plain.load_trained_state(model.trained_state())
    assert torch.equal(
        plain.image(torch.ones(1, 3, 32, 32)).raw_BD, model.image.pretrained_copy()(torch.ones(1, 3, 32, 32)).raw_BD
    )


@pytest.mark.parametrize("option", ["attention_cap", "attention_drop"])
@pytest.mark.parametrize("make", [resnet, VITS["normalised queries"]], ids=["resnet", "attention of open_clip's own"])
def test_a_tower_without_plain_attention_is_an_error_in_a_sentence(option, make):
    with pytest.raises(
        ValueError, match=rf"^model\.{option}=0\.5: .* no blocks of plain attention; set model\.{option}=0"
    ):
        tower_of(build(make)).equip(ModelConfig(**{option: 0.5}))


@pytest.mark.parametrize("option", ["attention_cap", "attention_drop"])
def test_open_clip_cannot_carry_it(tmp_path, option):
    with pytest.raises(
        ValueError, match=r"^model\.attention_cap, model\.attention_drop: open_clip has plain attention only"
    ):
        export_open_clip(load(tmp_path / "start", **{option: 0.5}), tmp_path / "export")
