"""The training loop on real shards and a real (tiny) CLIP: it learns, resumes bit for bit, and fails in sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zsr.config import OBJECTIVES
from zsr.engine.checkpoint import MODEL, load_trained
from zsr.engine.loop import Diverged, Trainer, train
from zsr.engine.session import LocalSession

MakeConfig = Callable[..., Any]


class Interrupted(Exception):
    pass


class StopAfter(LocalSession):
    """A session whose machine dies after a number of reports: what training wrote by then is all that is left."""

    def __init__(self, folder: Path, reports: int) -> None:
        super().__init__(folder)
        self.left = reports

    def report(self, metrics: dict[str, float], checkpoint: Any) -> None:
        super().report(metrics, checkpoint)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


class Recorder:
    run_id = "test"

    def __init__(self) -> None:
        self.metrics: list[tuple[int, str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics += [(step, name, value) for name, value in metrics.items()]

    def log_params(self, params: Any) -> None: ...
    def log_artifact(self, path: Path, folder: str = "") -> None: ...
    def set_tags(self, tags: Any) -> None: ...
    def finish(self, status: str) -> None: ...


def final_files(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    newest = LocalSession(folder).saved()[-1]
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    return load_file(newest / MODEL), optimizer, json.loads((newest / "state.json").read_text())


# Every objective, and every option that adds something to a model.
RESUMED = [(name, "", 1 + 2 * (number % 2)) for number, name in enumerate(OBJECTIVES.names())] + [
    ("tima", "", 3),
    ("tima", "model.adapt=token_prompt", 1),
    ("tecoa", "model.adapt=prompts model.prompt_pixels=3", 3),
    ("regmix", "model.attention_cap=0.2 model.attention_drop=0.3", 1),
    ("tima", "model.expand_text=true", 3),
    ("tima", "objective.variant=aaai26 optim.name=sgd optim.text_lr_factor=0.1", 1),
]


@pytest.mark.parametrize(("objective", "options", "stop_at_report"), RESUMED)
def test_a_resumed_run_is_bit_equal_to_the_run_that_was_not_interrupted(
    tmp_path: Path, make_config: MakeConfig, objective: str, options: str, stop_at_report: int
) -> None:
    # A checkpoint every 5 steps of epochs of 6: one stop is inside the first epoch, the other inside the second.
    settings = [f"objective.name={objective}", "train.checkpoint_every=5", "attack.schedule.name=cosine"]
    config = make_config(*settings, *options.split())
    straight, resumed = Recorder(), Recorder()
    whole = train(config, LocalSession(tmp_path / "straight"), straight)

    with pytest.raises(Interrupted):
        train(config, StopAfter(tmp_path / "resumed", stop_at_report), resumed)
    torch.rand(7)  # whatever else the new process did with the global random stream
    again = train(config, LocalSession(tmp_path / "resumed"), resumed)

    assert again.steps == whole.steps == 12
    assert again.metrics == whole.metrics
    weights, optimizer, state = final_files(tmp_path / "straight")
    weights2, optimizer2, state2 = final_files(tmp_path / "resumed")
    assert all(torch.equal(weights[name], weights2[name]) for name in weights | weights2)
    for key, slot in optimizer["optimizer"]["state"].items():
        for name, value in slot.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer2["optimizer"]["state"][key][name]))
    assert state["position"] == state2["position"]
    timed = ("perf/", "cost/", "data/wait")
    values = {(s, n): v for s, n, v in straight.metrics if not n.startswith(timed)}
    values2 = {(s, n): v for s, n, v in resumed.metrics if not n.startswith(timed)}
    assert values == values2


def test_training_lowers_the_loss_and_moves_only_what_it_should(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(
        "objective.name=tecoa", "attack.eps=1/255", "train.epochs=20", "optim.name=adamw", "optim.lr=3e-3"
    )
    recorder = Recorder()
    trainer = Trainer(config, LocalSession(tmp_path), recorder)
    text = {n: p.detach().clone() for n, p in trainer.model.open_clip.named_parameters() if not n.startswith("visual")}
    projection = trainer.model.text_projection.detach().clone()
    trainer.run()
    losses = [value for _, name, value in recorder.metrics if name == "train/loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(projection, trainer.model.text_projection)
    after = dict(trainer.model.open_clip.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in text.items())


def test_a_checkpoint_loads_as_the_model_that_wrote_it(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config("objective.name=tima")
    trainer = Trainer(config, LocalSession(tmp_path), None)
    trainer.run()
    model, loaded = load_trained(LocalSession(tmp_path).saved()[-1])
    image = torch.rand(3, 3, 32, 32)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(model.encode_image(image).embed_BD, trainer.model.encode_image(image).embed_BD)
    assert torch.equal(model.text_projection, trainer.model.text_projection)
    assert loaded.digest() == config.digest()


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config("objective.name=clean", "train.checkpoint_every=4")
    train(config, LocalSession(tmp_path, keep=3), None)
    session = LocalSession(tmp_path, keep=3)
    newest, before = session.saved()[-1], session.saved()[-2]
    content = (newest / MODEL).read_bytes()
    (newest / MODEL).write_bytes(content[: len(content) // 2])
    assert session.resume_from() == before


def test_a_checkpoint_of_other_settings_is_refused_with_the_setting(tmp_path: Path, make_config: MakeConfig) -> None:
    train(make_config("objective.name=clean"), LocalSession(tmp_path), None)
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.01, is 0\.02"):
        train(make_config("objective.name=clean", "optim.lr=0.02"), LocalSession(tmp_path), None)


def test_divergence_is_an_error_that_names_the_steps(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(Diverged, match=r"between steps \d+ and \d+; lower optim.lr"):
        train(make_config("objective.name=clean", "optim.lr=1e38"), LocalSession(tmp_path), None)


def test_batch_of_the_plan_is_used_once_each_and_every_epoch(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config("objective.name=clean", "data.last_batch=complete")
    result = train(config, LocalSession(tmp_path), None)
    assert result.steps == 2 * 7  # 50 samples in batches of 8
