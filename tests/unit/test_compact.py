"""Compact weights: what is kept, what is filled in, and that open_clip takes the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zsr
from zsr.models.compact import load_compact, save_compact

USED = [3, 7, 40]


def small_state(rows: int = 50, width: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "token_embedding.weight": torch.randn(rows, width, generator=generator),
        "visual.conv1.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "logit_scale": torch.tensor(3.14159265),
    }


def test_used_rows_come_back_and_all_others_are_their_mean(tmp_path: Path) -> None:
    state = small_state()
    save_compact(state, tmp_path / "model.safetensors", USED)
    table = load_compact(tmp_path / "model.safetensors")["token_embedding.weight"]
    assert table.shape == (50, 8)
    assert torch.equal(table[USED], state["token_embedding.weight"][USED].half().float())
    others = [row for row in range(50) if row not in USED]
    mean = state["token_embedding.weight"][USED].half().float().mean(0).half().float()
    assert torch.equal(table[others], mean.expand(len(others), -1))


def test_everything_is_fp32_and_scalars_are_exact(tmp_path: Path) -> None:
    state = small_state()
    save_compact(state, tmp_path / "model.safetensors", USED)
    loaded = load_compact(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert torch.equal(loaded["logit_scale"], state["logit_scale"])
    torch.testing.assert_close(loaded["visual.conv1.weight"], state["visual.conv1.weight"], atol=2e-3, rtol=1e-3)


def test_saving_what_was_loaded_changes_nothing(tmp_path: Path) -> None:
    save_compact(small_state(), tmp_path / "a.safetensors", USED)
    save_compact(load_compact(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", reversed(USED))
    first, second = (load_compact(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_ordinary_file_is_returned_as_it_is(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "plain.safetensors")
    loaded = load_compact(tmp_path / "plain.safetensors")
    assert loaded.keys() == tensors.keys()
    assert loaded["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("used", [[], [50], [-1]])
def test_ids_outside_the_table_are_refused(tmp_path: Path, used: list[int]) -> None:
    with pytest.raises(ValueError, match="Token ids"):
        save_compact(small_state(), tmp_path / "model.safetensors", used)


def test_a_model_without_a_token_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No token_embedding"):
        save_compact({"weight": torch.ones(2)}, tmp_path / "model.safetensors", [0])


def test_the_embedded_weights_fit_an_open_clip_model() -> None:
    from zsr.recipes.emoji_eval import class_embeddings, load_model

    folder = Path(zsr.__file__).parent / "models" / "embedded" / "emoji-vit"
    model, tokenizer, normalize = load_model(folder)  # load_state_dict is strict
    assert model.visual.grid_size == (8, 8)
    with torch.no_grad():
        assert model.encode_image(normalize(torch.rand(2, 3, 64, 64))).shape == (2, 128)
    text = class_embeddings(model, tokenizer, ["rocket", "cheese wedge"], ["an emoji of {}."])
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))
