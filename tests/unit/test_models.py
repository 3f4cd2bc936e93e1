"""RobustCLIP against open_clip itself: same numbers, fewer copies, and a text tower that runs once.

Shapes: B images, C classes, K templates, P patches, D embedding width, E text width before projection.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import ARCHITECTURE, PREPROCESS
from torch import Tensor, nn

from zsr.config import ModelConfig
from zsr.models import RobustCLIP, TextBank, class_embeddings, export_open_clip, load_model
from zsr.models.attention import ContiguousAttention, use_fast_attention

# isort: split
import open_clip  # after zsr, which makes torchvision importable beside CPU torch

torch.set_num_threads(1)

CLASSES, TEMPLATES = ["cat", "red car", "boat"], ["a photo of a {}.", "a drawing of {}", "{}"]
VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"vision_cfg": {"pool_type": "avg"}},
    "average, norm after": {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}},
    "class token, norm after": {"vision_cfg": {"final_ln_after_pool": True}},
    "quick gelu": {"quick_gelu": True},
    "layer scale, no first norm": {"vision_cfg": {"ls_init_value": 0.1, "no_ln_pre": True}},
    "text in its own module": {"custom_text": True},
    "text projection with a bias": {"text_cfg": {"proj_bias": True}},
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 64}},
}
VITS = [name for name in VARIANTS if name != "resnet"]


def write_variant(folder: Path, name: str) -> str:
    """A tiny model of this architecture with random weights, biases and gains included, as open_clip's local-dir."""
    architecture: dict[str, Any] = copy.deepcopy(ARCHITECTURE)
    for key, value in VARIANTS[name].items():
        architecture[key] = architecture.get(key, {}) | value if isinstance(value, dict) else value
    kind = open_clip.CustomTextCLIP if architecture.get("custom_text") else open_clip.CLIP
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**{key: value for key, value in architecture.items() if key != "custom_text"})
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": architecture, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def load_both(folder: Path, variant: str = "class token") -> tuple[RobustCLIP, Any]:
    """The same weights as a RobustCLIP and as open_clip loads them itself."""
    name = write_variant(folder, variant)
    return load_model(ModelConfig(name=name)).eval(), open_clip.create_model(name).eval()


def make_pixels(num: int = 3) -> Tensor:
    return torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def normalize(pixels_BCHW: Tensor) -> Tensor:
    return torch.stack([(pixels_BCHW[:, c] - PREPROCESS["mean"][c]) / PREPROCESS["std"][c] for c in range(3)], dim=1)


# Attention.


def attention_pair(width: int = 32, heads: int = 4) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    slow = nn.MultiheadAttention(width, heads, batch_first=True)
    nn.init.normal_(slow.in_proj_bias)
    nn.init.normal_(slow.out_proj.bias)
    fast = copy.deepcopy(slow)
    assert use_fast_attention(nn.Sequential(fast)) == 1 and isinstance(fast, ContiguousAttention)
    return slow, fast


def causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


def run_attention(module: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_(True)
    out, weights = module(x, x, x, need_weights=False, attn_mask=mask)
    assert weights is None
    wanted = torch.autograd.grad(
        (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), [x, *module.parameters()]
    )
    return out.detach(), list(wanted)


MASKS = {
    "none": None,
    "causal": causal(7),
    "boolean": causal(7).isinf(),
    "per head": causal(7).isinf().float().mul(-2).repeat(2 * 4, 1, 1),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("training", [True, False])
def test_fast_attention_equals_torchs_forward_and_backward(mask, training):
    slow, fast = attention_pair()
    slow.train(training)
    fast.train(training)
    x = torch.randn(2, 7, 32, generator=torch.manual_seed(1))
    out, gradients = run_attention(slow, x, MASKS[mask])
    fast_out, fast_gradients = run_attention(fast, x, MASKS[mask])
    assert torch.allclose(fast_out, out, rtol=1e-6, atol=1e-6)
    for found, expected in zip(fast_gradients, gradients, strict=True):
        assert (found - expected).norm() < 1e-6 * max(expected.norm().item(), 1)


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_fast_attention_in_bf16_is_as_near_to_fp32_as_torchs(mask):
    slow, fast = attention_pair()
    x = torch.randn(2, 7, 32, generator=torch.manual_seed(1))
    exact, _ = run_attention(slow, x, MASKS[mask])
    with torch.autocast("cpu", torch.bfloat16):
        slow_out, _ = run_attention(slow, x, MASKS[mask])
        fast_out, gradients = run_attention(fast, x, MASKS[mask])
    assert fast_out.dtype == slow_out.dtype == torch.bfloat16
    slow_error, fast_error = ((out.float() - exact).norm() / exact.norm() for out in (slow_out, fast_out))
    assert fast_error < 0.02 and fast_error < 1.5 * slow_error
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_what_clip_never_asks_of_attention_goes_to_torchs_own():
    slow, fast = attention_pair()
    x, other = torch.randn(2, 2, 5, 32, generator=torch.manual_seed(1))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for arguments in (
        {"need_weights": True},
        {"need_weights": False, "key_padding_mask": padding},
        {"need_weights": True, "average_attn_weights": False},
    ):
        for expected, found in zip(slow(x, x, x, **arguments), fast(x, x, x, **arguments), strict=True):
            assert (expected is None and found is None) or torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(fast(x, other, other)[0], slow(x, other, other)[0], atol=1e-6)


def test_attention_that_is_laid_out_otherwise_keeps_its_class():
    others = nn.ModuleList(
        [
            nn.MultiheadAttention(32, 4),
            nn.MultiheadAttention(32, 4, batch_first=True, kdim=16),
            nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True),
            nn.MultiheadAttention(32, 4, batch_first=True, add_zero_attn=True),
        ]
    )
    assert use_fast_attention(others) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tower_with_fast_attention_equals_open_clips_forward_and_backward(tmp_path, variant):
    model, original = load_both(tmp_path, variant)
    assert any(isinstance(module, ContiguousAttention) for module in model.modules())
    pixels = make_pixels().requires_grad_(True)
    features = model.encode_image(pixels)
    expected = original.encode_image(normalize(pixels))
    assert torch.allclose(features.raw_BD, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(features.embed_BD.norm(dim=1), torch.ones(3))
    assert torch.allclose(features.embed_BD, F.normalize(expected, dim=-1), rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (gradient,) = torch.autograd.grad((features.raw_BD * weights).sum(), pixels, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), pixels, retain_graph=True)
    assert (gradient - wanted).norm() < 1e-6 * max(wanted.norm().item(), 1)
    (features.raw_BD * weights).sum().backward()
    (expected * weights).sum().backward()
    mine = dict(model.image.visual.named_parameters())
    for name, parameter in original.visual.named_parameters():
        if parameter.grad is None:
            assert mine[name].grad is None
        else:
            assert (mine[name].grad - parameter.grad).norm() < 1e-5 * max(parameter.grad.norm().item(), 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_keep_their_names_order_and_values(tmp_path, variant):
    model, original = load_both(tmp_path, variant)
    mine, theirs = model.open_clip.state_dict(), original.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# Images.


def plain_tokens(original: Any, pixels_BCHW: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """Pooled and patch features step by step: patches cut out by hand, the blocks with torch's own attention."""
    visual, size = original.visual, 8
    patches = [
        normalize(pixels_BCHW)[:, :, row : row + size, column : column + size].flatten(1)
        for row in range(0, 32, size)
        for column in range(0, 32, size)
    ]
    x = torch.stack(patches, dim=1) @ visual.conv1.weight.flatten(1).T
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks:
        x = block(x)
    norm_first = "norm after" not in variant
    if norm_first:
        x = visual.ln_post(x)
    pooled = x[:, 1:].mean(dim=1) if "average" in variant else x[:, 0]
    tokens = x[:, 1:]
    if not norm_first:
        pooled, tokens = visual.ln_post(pooled), visual.ln_post(tokens)
    return pooled @ visual.proj, tokens @ visual.proj


@pytest.mark.parametrize("variant", VITS)
def test_tokens_and_embedding_of_one_pass_equal_a_computation_by_hand(tmp_path, variant):
    model, original = load_both(tmp_path, variant)
    passes = []
    model.image.visual.transformer.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        features = model.encode_image(make_pixels(), tokens=True)
        pooled, tokens = plain_tokens(original, make_pixels(), variant)
    assert len(passes) == 1
    assert features.tokens_BPD is not None and features.tokens_BPD.shape == (3, 16, 16)
    assert torch.allclose(features.tokens_BPD, tokens, rtol=1e-5, atol=1e-5)
    assert torch.allclose(features.raw_BD, pooled, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        without = model.encode_image(make_pixels())
    assert without.tokens_BPD is None
    assert torch.allclose(without.embed_BD, features.embed_BD, rtol=1e-5, atol=1e-6)


def test_normalisation_happens_inside(tmp_path):
    model, original = load_both(tmp_path)
    grey = torch.full((1, 3, 32, 32), 0.5)  # the model's mean: zero after normalisation
    with torch.no_grad():
        assert torch.allclose(model.encode_image(grey).raw_BD, original.encode_image(torch.zeros_like(grey)), atol=1e-6)
    assert model.image_size == 32
    assert not {"image.mean", "image.std"} & set(model.state_dict())


def test_bf16_gives_float32_near_fp32(tmp_path):
    name = write_variant(tmp_path, "class token")
    fp32, bf16 = (load_model(ModelConfig(name=name), precision).eval() for precision in ("fp32", "bf16"))
    with torch.no_grad():
        one, other = fp32.encode_image(make_pixels(), tokens=True), bf16.encode_image(make_pixels(), tokens=True)
    assert other.embed_BD.dtype == other.raw_BD.dtype == other.tokens_BPD.dtype == torch.float32
    assert (one.embed_BD * other.embed_BD).sum(1).min() > 0.999
    assert torch.allclose(other.embed_BD.norm(dim=1), torch.ones(3))


def test_only_the_image_tower_is_trainable(tmp_path):
    model, _ = load_both(tmp_path)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(name.startswith("image.visual.") for name in trainable)
    assert len(trainable) == len(list(model.image.visual.parameters()))
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)


# Text.


def count_text_passes(model: RobustCLIP) -> list[int]:
    passes: list[int] = []
    model.open_clip.transformer.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    return passes


@pytest.mark.parametrize("variant", ["class token", "text in its own module", "text projection with a bias"])
def test_class_embeddings_equal_open_clips_own(tmp_path, variant):
    model, original = load_both(tmp_path, variant)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    features = TextBank(model).features(CLASSES, TEMPLATES)
    with torch.no_grad():
        expected = []
        for name in CLASSES:  # CLIP's prompt ensemble, as open_clip's zero-shot classifier makes it
            prompts = original.encode_text(tokenizer([t.format(name) for t in TEMPLATES]), normalize=True)
            expected.append(F.normalize(prompts.mean(dim=0), dim=-1))
        single = original.encode_text(tokenizer([TEMPLATES[0].format(name) for name in CLASSES]), normalize=True)
    assert torch.allclose(class_embeddings(features, model.text_projection), torch.stack(expected), atol=1e-6)
    assert torch.allclose(class_embeddings(features[:, :1], model.text_projection), single, atol=1e-6)


def test_the_text_tower_runs_once_per_prompt_set(tmp_path):
    model, _ = load_both(tmp_path)
    passes, bank = count_text_passes(model), TextBank(model)
    first = bank.features(CLASSES, TEMPLATES)
    assert sum(passes) == len(CLASSES) * len(TEMPLATES)
    for _ in range(3):
        assert torch.equal(bank.features(CLASSES, TEMPLATES), first)
    assert len(passes) == 1
    bank.features(CLASSES, TEMPLATES[:1])
    bank.features(CLASSES[:2], TEMPLATES)
    assert len(passes) == 3


def test_the_text_tower_never_runs_again_where_features_are_on_disk(tmp_path):
    model, _ = load_both(tmp_path / "model")
    first = TextBank(model, tmp_path / "cache").features(CLASSES, TEMPLATES)
    passes = count_text_passes(model)
    assert torch.equal(TextBank(model, tmp_path / "cache").features(CLASSES, TEMPLATES), first)
    assert not passes


def test_cached_features_are_found_by_prompts_and_frozen_text_weights_alone(tmp_path):
    cache, name = tmp_path / "cache", write_variant(tmp_path / "model", "class token")

    def new_keys(change: Any = None, classes: Sequence[str] = CLASSES, template: str = "a {}") -> int:
        model = load_model(ModelConfig(name=name))
        if change is not None:
            with torch.no_grad():
                change(model)
        before = set(cache.glob("*.safetensors"))
        TextBank(model, cache).features(classes, [template])
        return len(set(cache.glob("*.safetensors")) - before)

    assert new_keys() == 1
    assert new_keys() == 0
    assert new_keys(template="the {}") == 1
    assert new_keys(classes=CLASSES[::-1]) == 1
    assert new_keys(lambda model: model.open_clip.ln_final.bias.add_(1e-3)) == 1
    assert new_keys(lambda model: model.open_clip.token_embedding.weight[-1].add_(1e-3)) == 1
    # What comes after the cached features, or beside them, changes nothing.
    assert new_keys(lambda model: model.text_projection.add_(1)) == 0
    assert new_keys(lambda model: model.image.visual.proj.add_(1)) == 0


def test_equal_prompts_from_other_classes_and_templates_keep_their_own_shape(tmp_path):
    bank = TextBank(load_both(tmp_path)[0])
    assert bank.features(["red car"], ["{} here", "{} there"]).shape[:2] == (1, 2)
    assert bank.features(["red car here", "red car there"], ["{}"]).shape[:2] == (2, 1)


@pytest.mark.parametrize(
    ("classes", "templates", "says"),
    [([], ["{}"], "at least one class name"), (["cat"], [], "one template"), (["cat"], ["a cat"], r"has no \{\}")],
)
def test_prompts_that_make_no_classes_are_errors_in_a_sentence(tmp_path, classes, templates, says):
    with pytest.raises(ValueError, match=says):
        TextBank(load_both(tmp_path)[0]).features(classes, templates)


def test_encoding_prompts_leaves_the_model_as_it_was(tmp_path):
    model, _ = load_both(tmp_path)
    model.train()
    model.open_clip.visual.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.encode_prompts(["a cat"])
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Saving.


@pytest.mark.parametrize("variant", [*VARIANTS])
@pytest.mark.parametrize("tuned", [False, True])
def test_an_export_is_the_same_model_to_open_clip(tmp_path, variant, tuned):
    name = write_variant(tmp_path / "start", variant)
    model = load_model(ModelConfig(name=name)).eval()
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        if tuned:
            model.text_projection += 0.1 * torch.randn_like(model.text_projection)
    folder = export_open_clip(model, tmp_path / "export")
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    loaded.eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a {name}" for name in CLASSES])
    with torch.no_grad():
        image = loaded.encode_image(preprocess(picture)[None], normalize=True)
        text = loaded.encode_text(tokens, normalize=True)
        assert torch.allclose(image, model.encode_image(pixels).embed_BD, atol=1e-5)
    embeddings = class_embeddings(TextBank(model).features(CLASSES, ["a {}"]), model.text_projection)
    assert torch.allclose(text, embeddings, atol=1e-6)
    assert loaded.logit_scale.exp().item() == pytest.approx(model.logit_scale.item())


def test_an_export_is_again_a_model_of_zsr(tmp_path):
    model, _ = load_both(tmp_path / "start")
    with torch.no_grad():
        model.text_projection += 0.1
    again = load_model(ModelConfig(name=f"local-dir:{export_open_clip(model, tmp_path / 'export')}")).eval()
    assert torch.equal(again.text_projection, model.text_projection)
    with torch.no_grad():
        assert torch.equal(again.encode_image(make_pixels()).raw_BD, model.encode_image(make_pixels()).raw_BD)
    written = load_file(tmp_path / "export" / "open_clip_model.safetensors")
    assert set(written) == set(model.open_clip.state_dict())


def test_trained_state_returns_to_a_fresh_model_and_fits_no_other(tmp_path):
    model, _ = load_both(tmp_path / "one")
    with torch.no_grad():
        for parameter in (*model.image.parameters(), model.text_projection):
            parameter += 0.1 * torch.randn_like(parameter)
    fresh, _ = load_both(tmp_path / "one")
    fresh.load_trained_state(model.trained_state())
    mine, theirs = fresh.trained_state(), model.trained_state()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    other, _ = load_both(tmp_path / "two", "layer scale, no first norm")
    with pytest.raises(
        ValueError, match=r"do not fit local-dir:.*; set model\.name to the model they were trained from"
    ):
        other.load_trained_state(model.trained_state())


# Mistakes.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "ViT-B-33"}, r"^model\.name=ViT-B-33: is not an open_clip model; did you mean 'ViT-B-32'\?$"),
        (
            {"name": "ViT-B-32"},
            r"^model\.pretrained: ViT-B-32 needs a tag \(openai, .*\), a weights file, or 'random'$",
        ),
        (
            {"name": "ViT-B-32", "pretrained": "opanai"},
            r"^model\.name=ViT-B-32 model\.pretrained=opanai: cannot be loaded",
        ),
        ({"name": "zsr:emoji-vot"}, r"^model\.name=zsr:emoji-vot: is not an embedded model"),
        ({"name": "local-dir:/no/such/folder"}, r"^model\.name=local-dir:/no/such/folder .*: cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_had_is_an_error_in_a_sentence(options, says):
    with pytest.raises(ValueError, match=says):
        load_model(ModelConfig(**options))
