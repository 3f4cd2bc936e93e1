"""Two real processes train as one would: same samples, same attack noise, same gradients, and an exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from two_ranks import run_ranks

from zsr.engine.checkpoint import read_state
from zsr.engine.loop import train
from zsr.engine.session import LocalSession


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(LocalSession(folder).saved()[-1] / "model.safetensors")


def checks(folder: Path) -> dict[str, float]:
    metrics = read_state(LocalSession(folder).saved()[-1])["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("val/check/")}


@pytest.mark.parametrize("objective", ["tecoa", "tima"])
def test_two_ranks_give_the_weights_that_one_rank_gives(
    tmp_path: Path, make_config: Callable[..., Any], objective: str
) -> None:
    # Plain gradient descent: rounding differs between the two, and Adam would blow it up to the size of a step. Few steps
    # and a small attack step, because a sign in the attack can flip on a rounding difference.
    config = make_config(f"objective.name={objective}", "train.max_steps=3", "optim.momentum=0", "optim.lr=0.1")
    train(config, LocalSession(tmp_path / "one"), None)
    run_ranks(config, tmp_path / "two", world_size=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = weights_before(config)
    for name, value in one.items():
        moved = (value - start[name]).abs().max()
        assert (value - two[name]).abs().max() <= 0.02 * moved + 1e-7, name
    assert len(checks(tmp_path / "one")) >= 10
    assert checks(tmp_path / "one") == checks(tmp_path / "two"), "what the ranks saw adds up"


def test_unequal_shares_of_a_batch_give_the_weights_that_one_rank_gives(
    tmp_path: Path, make_config: Callable[..., Any]
) -> None:
    """Three ranks share eight samples as 2, 3 and 3: a mean of their gradients that ignored that would be another."""
    config = make_config("objective.name=clean", "train.max_steps=3", "optim.momentum=0", "optim.lr=0.1")
    train(config, LocalSession(tmp_path / "one"), None)
    run_ranks(config, tmp_path / "three", world_size=3)
    one, three, start = weights(tmp_path / "one"), weights(tmp_path / "three"), weights_before(config)
    apart = torch.cat([(three[name] - one[name]).flatten() for name in one]).norm()
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one]).norm()
    assert apart < 1e-4 * moved


def test_two_ranks_resume_bit_for_bit(tmp_path: Path, make_config: Callable[..., Any]) -> None:
    config = make_config("objective.name=tima", "train.max_steps=6", "train.checkpoint_every=3")
    run_ranks(config, tmp_path / "straight", world_size=2)
    run_ranks(config, tmp_path / "resumed", world_size=2, stop_after_reports=1)
    assert [path.name for path in LocalSession(tmp_path / "resumed").saved()] == ["step-00000003"]
    run_ranks(config, tmp_path / "resumed", world_size=2)
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def weights_before(config: Any) -> dict[str, torch.Tensor]:
    from zsr.models import load_model

    return {name: value.clone() for name, value in load_model(config.model).trained_state().items()}
