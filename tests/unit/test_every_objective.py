"""Every objective runs from the command line and in a sweep, on real shards, with the options that go with any of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from zsr.cli.main import main
from zsr.config import OBJECTIVES, load_config
from zsr.launch.sweep import main as sweep_main
from zsr.launch.sweep import make_plan, parse_arguments

# Presets with a published recipe: objective, learning rate, batch, attack steps.
PUBLISHED = {
    "tga_zsr-vit-b32-tinyimagenet": ("tga_zsr", 1e-4, 128, 2),
    "comp_tga-vit-b32-tinyimagenet": ("comp_tga", 1e-4, 128, 2),
    "pmg_aft-vit-b32-tinyimagenet": ("pmg_aft", 5e-5, 256, 2),
    "fare-vit-b32-imagenet": ("fare", 1e-5, 128, 10),
    "agft-vit-b32-imagenet": ("agft", 4e-4, 256, 2),
    "tecoa_prompt-vit-b32-imagenet": ("tecoa", 40, 256, 2),
}


def tiny(model: str, shards: Path, *settings: str) -> list[str]:
    paths = [f"model.name={model}", f"data.train={shards}", f"data.val={shards}"]
    sizes = [
        "train.max_steps=2",
        "train.batch_size=10",
        "eval.num_samples=10",
        "eval.attack.steps=1",
        "train.num_threads=1",
    ]
    return [*paths, *sizes, *settings]


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_it_trains_from_the_command_line(tiny_model_name, small_shards, tmp_path, name, capsys):
    arguments = tiny(tiny_model_name, small_shards, f"objective={name}", "train.cache_frozen=true")
    run("train", "--local", "--output", str(tmp_path / "run"), *arguments)
    out = capsys.readouterr().out
    assert "val/robust_acc" in out and (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").is_file()


@pytest.mark.parametrize("option", ["adapt=token_prompt", "adapt=pad_prompt", "attention_cap=0.2", "expand_text=true"])
@pytest.mark.parametrize("name", ["tima", "pmg_aft"])
def test_any_of_them_takes_prompts_capped_attention_and_expanded_text(
    tiny_model_name, small_shards, tmp_path, name, option, capsys
):
    pixels = ["model.prompt_pixels=3"] if option == "adapt=pad_prompt" else []
    settings = tiny(tiny_model_name, small_shards, f"objective={name}", f"model.{option}", *pixels)
    run("train", "--local", "--output", str(tmp_path / "run"), *settings)
    run("eval", "--model", str(tmp_path / "run"), "--data", str(small_shards), "--eps", "1/255", "--num-samples", "10")
    assert "chance" in capsys.readouterr().out


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_a_sweep_takes_it(name, capsys):
    from sweeps.tecoa_sweep import SWEEP

    arguments = ["--dry-run", "--preset", "demo", f"objective={name}"]
    assert make_plan(SWEEP, parse_arguments(SWEEP, arguments)).config.objective.name == name
    assert sweep_main(SWEEP, arguments) == 0
    assert "dry_run=done" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_carry_the_published_settings(preset):
    config = load_config(preset)
    found = (config.objective.name, config.optim.lr, config.train.batch_size, config.attack.steps)
    assert found == PUBLISHED[preset] and config.name == preset


@pytest.mark.parametrize("name", ["tga_zsr", "comp_tga", "ccr_ccs"])
def test_a_tower_without_patch_tokens_is_refused_before_training(small_shards, tmp_path, name, capsys):
    settings = tiny("coca_ViT-B-32", small_shards, "model.pretrained=random", f"objective={name}")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--local", "--output", str(tmp_path / "run"), *settings])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"objective.name={name} needs patch tokens, and model.name=coca_ViT-B-32 has none:" in said
