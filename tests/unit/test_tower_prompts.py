"""Prompts in front of a frozen image tower: where they act, that they alone are trained, and that nothing loses them.

Shapes: B images, E width inside the tower, L tokens of a sequence, H x W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import write_variant
from test_tower_tokens import VIT, VITS, build, embed, make_pixels, normalize, resnet, tower_of
from tiny_clip import tiny_clip, write_tiny_clip
from torch import Tensor

from zsr.config import ModelConfig, load_config
from zsr.engine.checkpoint import load_trained
from zsr.engine.loop import Trainer
from zsr.engine.session import LocalSession
from zsr.models import ImageTower, RobustCLIP, export_open_clip, load_model

# isort: split
from open_clip.timm_model import TimmModel  # after zsr, which makes torchvision importable beside CPU torch
from open_clip.transformer import VisionTransformer

PROMPTS = {
    "pad_prompt": {"adapt": "pad_prompt", "prompt_pixels": 3},
    "token_prompt": {"adapt": "token_prompt", "prompt_tokens": 4},
    "prompts": {"adapt": "prompts", "prompt_pixels": 3, "prompt_tokens": 4},
}
TRAINED = {
    "pad_prompt": ["prompt.pad.border"],
    "token_prompt": ["prompt.token.tokens"],
    "prompts": ["prompt.pad.border", "prompt.token.tokens"],
}


def prompted(visual: Any, adapt: str, **options: Any) -> ImageTower:
    tower = tower_of(visual)
    tower.equip(ModelConfig(**PROMPTS[adapt] | options))
    return tower.eval()


def fill(tower: ImageTower) -> Tensor:
    """Make the prompt one that cannot be overlooked; give back its first part."""
    for value in tower.prompt.parameters():
        with torch.no_grad():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(5)))
    return next(iter(tower.prompt.parameters()))


def prompted_clip(folder: Path, adapt: str) -> RobustCLIP:
    return load_model(ModelConfig(name=write_tiny_clip(folder), **PROMPTS[adapt]))


# Where they act.


ANY_TOWER = {
    "vit": VITS["class token"],
    "resnet": resnet,
    "timm": lambda: TimmModel("test_vit", embed_dim=16, image_size=160, pool="avg"),
}


@pytest.mark.parametrize("kind", ANY_TOWER)
@torch.no_grad()
def test_a_border_of_zeros_is_the_bare_tower_to_the_last_bit(kind):
    visual = build(ANY_TOWER[kind])
    pixels = make_pixels(visual)
    bare = tower_of(visual)(pixels).raw_BD
    tower = prompted(visual, "pad_prompt")
    assert torch.equal(tower(pixels).raw_BD, bare)
    fill(tower)
    assert (tower(pixels).raw_BD - bare).norm() > 1e-2 * bare.norm()


@pytest.mark.parametrize("kind", ["wide image", "class token"])
@torch.no_grad()
def test_the_border_is_added_to_the_outermost_pixels_after_normalisation(kind):
    visual = build(VITS[kind])
    pixels = make_pixels(visual)
    height, width = visual.image_size
    tower = prompted(visual, "pad_prompt")
    values = iter(fill(tower).T)
    expected = normalize(pixels)
    for row in range(height):
        for column in range(width):
            if min(row, column, height - 1 - row, width - 1 - column) < 3:
                expected[:, :, row, column] += next(values)
    assert not list(values)  # the prompt has no value that acts nowhere
    assert torch.allclose(tower(pixels).raw_BD, visual(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VITS)
@torch.no_grad()
def test_prompt_tokens_join_attention_and_are_gone_before_pooling(kind):
    visual = build(VITS[kind])
    pixels = make_pixels(visual)
    bare = embed(visual, pixels)
    tower = prompted(visual, "token_prompt")
    tokens_NE = fill(tower)
    found = tower(pixels, tokens=True)

    def append(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.cat([args[0], torch.stack([visual.ln_pre(tokens_NE)] * len(args[0]))], dim=1),)

    visual.transformer.register_forward_pre_hook(append)
    visual.transformer.register_forward_hook(lambda module, args, out: out[:, :-4])
    assert torch.allclose(found.raw_BD, embed(visual, pixels), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.raw_BD, bare, atol=1e-2)
    assert found.tokens_BPD.shape[1] == found.grid[0] * found.grid[1]
    leading = 0 if kind == "no class token" else 1
    visual._global_pool = lambda x: (x[:, leading + 5], x)
    assert torch.allclose(found.tokens_BPD[:, 5], embed(visual, pixels), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_prompts_together_are_one_after_the_other():
    visual = build(VITS["class token"])
    pixels, tower = make_pixels(visual), prompted(visual, "prompts")
    border_3N = fill(tower)
    alone = prompted(build(VITS["class token"]), "token_prompt")
    alone.visual.load_state_dict(visual.state_dict())
    fill(alone)
    height, width = visual.image_size
    outer_HW = torch.ones(height, width, dtype=torch.bool)
    outer_HW[3 : height - 3, 3 : width - 3] = False
    moved = pixels.clone()
    moved[:, :, outer_HW] += border_3N * tower.std.view(3, 1)  # added after normalisation: in units of it
    assert torch.allclose(tower(pixels).raw_BD, alone(moved).raw_BD, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tower(pixels).raw_BD, alone(pixels).raw_BD, atol=1e-2)


@torch.no_grad()
def test_a_tower_that_pools_by_attention_can_have_prompt_tokens():
    visual = build(lambda: VisionTransformer(**VIT, attentional_pool=True, attn_pooler_heads=2))
    tower = prompted(visual, "token_prompt")
    assert tower(make_pixels(visual)).raw_BD.shape == (2, 16)


@pytest.mark.parametrize("adapt", PROMPTS)
def test_prompts_work_in_bf16(adapt):
    visual = build(VITS["average"])
    exact = prompted(visual, adapt)
    rounded = tower_of(visual, "bf16")
    rounded.equip(ModelConfig(**PROMPTS[adapt]))
    fill(exact), fill(rounded)
    found, wanted = rounded(make_pixels(visual), tokens=True), exact(make_pixels(visual), tokens=True)
    assert found.raw_BD.dtype == torch.float32 and not torch.equal(found.raw_BD, wanted.raw_BD)
    assert (found.embed_BD * wanted.embed_BD).sum(1).min() > 0.99


# What is trained.


@pytest.mark.parametrize("adapt", PROMPTS)
def test_the_prompt_alone_has_a_gradient(tmp_path, adapt):
    model = prompted_clip(tmp_path, adapt)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == [f"image.{name}" for name in TRAINED[adapt]]
    model.train().encode_image(torch.rand(2, 3, 32, 32)).embed_BD[:, 0].sum().backward()
    assert all(prompt.grad.count_nonzero() == prompt.numel() for prompt in model.image.prompt.parameters())
    assert all(parameter.grad is None for parameter in model.image.visual.parameters())


@pytest.mark.parametrize("adapt", ["weights", "pad_prompt"])
def test_running_statistics_stay_those_of_pre_training(tmp_path, adapt):
    model = load_model(ModelConfig(name=write_variant(tmp_path, "resnet"), adapt=adapt, prompt_pixels=2))
    before = {name: value.clone() for name, value in model.image.visual.named_buffers()}
    model.train().encode_image(torch.rand(4, 3, 32, 32))
    assert before
    assert all(torch.equal(value, before[name]) for name, value in model.image.visual.named_buffers())


@pytest.mark.parametrize("adapt", PROMPTS)
@pytest.mark.parametrize("objective", ["tecoa", "tima"])
def test_training_moves_the_prompt_and_what_the_objective_tunes_of_the_text(tmp_path, make_config, adapt, objective):
    options = [f"model.{name}={value}" for name, value in PROMPTS[adapt].items()]
    config = make_config(f"objective={objective}", "train.max_steps=2", "optim.lr=1", *options)
    trainer = Trainer(config, LocalSession(tmp_path), None)
    before = {name: value.clone() for name, value in trainer.model.trained_state().items()}
    trainer.run()
    moved = {name for name, value in trainer.model.trained_state().items() if not torch.equal(value, before[name])}
    assert moved == {*TRAINED[adapt], *(["text_projection"] if objective == "tima" else [])}
    loaded, _ = load_trained(LocalSession(tmp_path).saved()[-1])
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels).raw_BD, trainer.model.eval().encode_image(pixels).raw_BD)


def test_a_prompt_starts_alike_in_every_run_and_leaves_the_global_random_stream_alone():
    state = torch.get_rng_state()
    one, other = (prompted(build(VITS["average"]), "token_prompt").prompt.token.tokens for _ in range(2))
    assert torch.equal(one, other) and one.std() > 0
    assert torch.equal(torch.get_rng_state(), state)


# Copies and files.


@pytest.mark.parametrize("adapt", PROMPTS)
@torch.no_grad()
def test_the_teacher_is_the_bare_tower_and_a_copy_keeps_the_prompt(tmp_path, adapt):
    bare, model, pixels = tiny_clip(tmp_path).eval(), prompted_clip(tmp_path, adapt).eval(), torch.rand(2, 3, 32, 32)
    fill(model.image)
    teacher, twin = model.image.pretrained_copy(), copy.deepcopy(model.image)
    assert torch.equal(teacher(pixels).raw_BD, bare.encode_image(pixels).raw_BD)
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    assert torch.equal(twin(pixels).raw_BD, model.encode_image(pixels).raw_BD)
    assert model.image.prompt is not None and twin.prompt is not model.image.prompt
    assert not torch.equal(twin(pixels).raw_BD, teacher(pixels).raw_BD)


def test_the_teacher_shares_no_memory_with_the_student(tmp_path):
    model = tiny_clip(tmp_path)
    teacher = model.image.pretrained_copy()
    assert all(parameter.requires_grad for parameter in model.image.parameters())
    own = {parameter.data_ptr() for parameter in model.image.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher.parameters()}


@pytest.mark.parametrize("adapt", PROMPTS)
def test_the_prompt_is_in_the_trained_state(tmp_path, adapt):
    model, fresh = prompted_clip(tmp_path, adapt), prompted_clip(tmp_path, adapt)
    fill(model.image)
    fresh.load_trained_state(model.trained_state())
    for mine, theirs in zip(model.image.prompt.parameters(), fresh.image.prompt.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_without_a_prompt_the_names_of_the_trained_state_are_those_of_older_checkpoints(tmp_path):
    model = tiny_clip(tmp_path)
    expected = {f"visual.{name}" for name in model.open_clip.visual.state_dict()} | {"text_projection"}
    assert set(model.trained_state()) == expected


def test_weights_of_another_adaptation_do_not_fit(tmp_path):
    bare, pad, tokens, both = tiny_clip(tmp_path), *(prompted_clip(tmp_path, adapt) for adapt in PROMPTS)
    fewer = load_model(ModelConfig(name=pad.arch, adapt="token_prompt", prompt_tokens=3))
    for model, other in ((bare, pad), (pad, bare), (pad, tokens), (fewer, tokens), (both, pad)):
        with pytest.raises(ValueError, match=r"prompt\.\w+\.\w+ for one; set model\.adapt, model\.prompt_tokens and"):
            model.load_trained_state(other.trained_state())


@pytest.mark.parametrize("adapt", PROMPTS)
def test_open_clip_cannot_carry_a_prompt(tmp_path, adapt):
    with pytest.raises(ValueError, match=rf"^model\.adapt={adapt}: open_clip's models cannot carry a prompt"):
        export_open_clip(prompted_clip(tmp_path / "start", adapt), tmp_path / "export")
    assert not (tmp_path / "export").exists()


# Mistakes.


@pytest.mark.parametrize("adapt", ["token_prompt", "prompts"])
@pytest.mark.parametrize("make", [resnet, ANY_TOWER["timm"]], ids=["resnet", "timm"])
def test_tokens_for_a_tower_that_is_no_vit_are_an_error_in_a_sentence(make, adapt):
    with pytest.raises(ValueError, match=rf"^model\.adapt={adapt}: .*; use model\.adapt=pad_prompt"):
        prompted(build(make), adapt)


@pytest.mark.parametrize(("pixels", "fits"), [(15, True), (16, False), (30, False)])
def test_a_border_leaves_some_of_the_image(pixels: int, fits: bool):
    def make() -> ImageTower:
        return prompted(build(VITS["average"]), "pad_prompt", prompt_pixels=pixels)

    if fits:
        assert make().prompt.pad.border.shape == (3, 32 * 32 - 2 * 2)
        return
    with pytest.raises(ValueError, match=rf"^model\.prompt_pixels={pixels}: .* of 32 x 32 pixels; use at most 15$"):
        make()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model.adapt=prompt",
            r"model\.adapt=.prompt.: should be 'weights', 'token_prompt', 'pad_prompt' or 'prompts'",
        ),
        ("model.prompt_tokens=0", r"model\.prompt_tokens=0: should be at least 1"),
        ("model.prompt_pixels=0", r"model\.prompt_pixels=0: should be at least 1"),
        ("model.attention_cap=1.5", r"model\.attention_cap=1\.5: should be at most 1"),
        ("model.attention_cap=-0.1", r"model\.attention_cap=-0\.1: should be at least 0"),
        ("model.attention_drop=1", r"model\.attention_drop=1.*: should be below 1"),
        ("model.attention_drop=nan", r"model\.attention_drop="),
    ],
)
def test_a_setting_out_of_range_is_an_error_in_a_sentence(override: str, says: str):
    with pytest.raises(ValueError, match=says):
        load_config("default", [override])


def test_prompts_and_attention_can_be_had_together():
    make: Callable[[], Any] = VITS["average"]
    tower = prompted(build(make), "token_prompt", attention_cap=0.5, attention_drop=0.2)
    assert tower(make_pixels(tower.visual), tokens=True).tokens_BPD.shape[1] == 16
