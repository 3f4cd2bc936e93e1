"""Presets, files and layers, up to a checked RunConfig."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zsr.config import ConfigError, load_config, preset_names, to_yaml


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_valid_and_survives_yaml(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    file = tmp_path / "copy.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config
    assert load_config(file).digest() == config.digest()


def test_without_a_source_it_is_the_default_preset() -> None:
    assert load_config() == load_config("default")


def test_presets_carry_the_published_settings() -> None:
    tecoa = load_config("tecoa-vit-b32-imagenet")
    assert (tecoa.objective.name, tecoa.train.batch_size, tecoa.train.epochs) == ("tecoa", 256, 10)
    assert (tecoa.optim.name, tecoa.optim.lr, tecoa.optim.warmup_steps) == ("sgd", 1e-5, 1000)
    assert tecoa.attack.eps == tecoa.attack.step_size == pytest.approx(1 / 255)
    assert tecoa.attack.steps == 2
    tima = load_config("tima-vit-b32-tinyimagenet")
    assert (tima.objective.name, tima.train.batch_size) == ("tima", 128)
    assert tima.attack == tecoa.attack


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1/10000", "'1e-4'"])
def test_numbers_as_people_write_them(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"optim: {{lr: {text}}}\n")
    assert load_config(file).optim.lr == pytest.approx(1e-4)
    assert load_config("default", [f"optim.lr={text}"]).optim.lr == pytest.approx(1e-4)


def test_yaml_itself_reads_such_a_number_as_text() -> None:
    assert yaml.safe_load("1e-4") == "1e-4"  # the reason for the test above


@settings(deadline=None)  # the first example also imports torch; a busy machine is slow at the others
@given(st.integers(0, 10**6), st.floats(1e-8, 10), st.integers(1, 255))
def test_overrides_reach_the_configuration(seed: int, lr: float, grey_levels: int) -> None:
    config = load_config("default", [f"seed={seed}", f"optim.lr={lr!r}", f"attack.eps={grey_levels}/255"])
    assert (config.seed, config.optim.lr) == (seed, lr)
    assert config.attack.eps == pytest.approx(grey_levels / 255)


def test_extends_lays_a_file_over_another_and_a_preset(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\ntrain: {epochs: 3}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {batch_size: 64}\n")
    config = load_config(tmp_path / "mine.yaml", ["train.log_every=7"])
    demo = load_config("demo")
    assert (config.train.epochs, config.train.batch_size, config.train.log_every) == (3, 64, 7)
    assert config.attack == demo.attack


def test_another_objective_in_an_upper_file_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("objective: {name: tima, weight_mhe: 0.7}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nobjective: tecoa\n")
    assert load_config(tmp_path / "mine.yaml").objective.name == "tecoa"


def test_base_lies_underneath() -> None:
    earlier = load_config("demo", ["seed=5"]).model_dump(mode="json")
    assert load_config(base=earlier).seed == 5
    assert load_config("demo", ["train.epochs=2"], base=earlier).seed == 5


def test_one_setting_of_a_default_plugin_is_enough() -> None:
    config = load_config(overrides=["eval.attack.steps=3", "attack.schedule.name=linear", "attack.schedule.end=0.5"])
    assert config.eval.attack.steps == 3
    assert config.eval.attack.eps == pytest.approx(1 / 255)
    assert config.attack.schedule.end == 0.5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("train: [", "is not valid YAML"),
        ("- a\n- b\n", "should hold settings by name"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("extends: nothing-like-it\n", "is not a preset or a file"),
        ("extends: run.yaml\n", "goes in a circle"),
        ("extends: [demo]\n", "should be the name of one preset"),
    ],
)
def test_files_that_cannot_be_read(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        load_config(file)


def test_a_python_object_in_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(file)


def test_an_unknown_preset_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_config("dmeo")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config("configs/mine.yaml")


def test_what_is_said_about_settings_of_the_run() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            overrides=[
                "objective.weight_mhe=-1",
                "attack.eps=4",
                "trian.epochs=3",
                "train.precision=fp16",
                "data.num_wokers=2",
            ]
        )
    problems = sorted(caught.value.problems)
    assert [problem.partition("=")[0] for problem in problems] == [
        "attack.eps",
        "data.num_wokers",
        "objective.weight_mhe",
        "train.precision",
        "trian.epochs",
    ]
    assert "write 4/255" in problems[0]
    assert "did you mean data.num_workers?" in problems[1]
    assert "did you mean train.epochs?" in problems[4]


def test_a_batch_that_workers_cannot_share() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size=128 cannot be shared equally by launch\.workers=3"):
        load_config(overrides=["launch.workers=3"])
