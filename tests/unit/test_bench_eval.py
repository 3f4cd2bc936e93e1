"""``zsr bench eval``: both sides of each comparison do the same thing, and what is counted is counted right."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from zsr.attacks.autoattack import AutoAttackConfig
from zsr.bench.eval_attack import compare_attacks
from zsr.bench.eval_prompts import compare_prompts
from zsr.bench.eval_rate import compare_rate
from zsr.bench.public_attack import PlainClassifier
from zsr.bench.sides import Sides, Spent, in_turns
from zsr.cli.main import app, explain
from zsr.config import ModelConfig
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import ZeroShotHead
from zsr.models import RobustCLIP, TextBank, load_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tiny_model_name) -> RobustCLIP:
    return load_model(ModelConfig(name=tiny_model_name)).eval()


@pytest.fixture(scope="module")
def shards(small_shards) -> ShardSet:
    return ShardSet(str(small_shards))


@pytest.fixture(scope="module")
def head(model, shards) -> ZeroShotHead:
    return ZeroShotHead(model, TextBank(model), shards.classes, shards.templates[:1])


def test_sides_are_ratios_of_sums_and_rounds():
    sides = Sides.of([Spent(1.0, 2.0), Spent(1.0, 6.0)], [Spent(3.0, 8.0), Spent(1.0, 6.0)])
    assert (sides.cpu_ratio, sides.wall_ratio) == (14 / 8, 4 / 2)
    assert (sides.cpu_rounds.median, sides.wall_rounds.median) == ((4 + 1) / 2, (3 + 1) / 2)
    assert sides.ratio("cpu") == sides.cpu_ratio and sides.ratio("cuda:0") == sides.wall_ratio


def test_turns_are_turned_round_and_timed_by_both_clocks():
    order = []

    def nap(number: int) -> int:
        order.append(("nap", number))
        time.sleep(0.1)
        return number

    def work(number: int) -> int:
        order.append(("work", number))
        began = time.process_time()
        while time.process_time() - began < 0.1:
            pass
        return 10 * number

    results, (naps, works) = in_turns([nap, work], 2, "cpu", "")
    assert order == [("nap", 0), ("work", 0), ("work", 1), ("nap", 1)]
    assert results == [[0, 1], [0, 10]]
    assert all(one.wall_s >= 0.09 > one.cpu_s for one in naps)
    assert all(one.wall_s >= 0.09 and one.cpu_s >= 0.09 for one in works)


def test_the_plain_classifier_is_ours_in_ordinary_layers_and_counts_its_passes(head):
    plain = PlainClassifier(head)
    image = torch.rand(3, 3, 32, 32, requires_grad=True)
    assert torch.allclose(plain(image), head(image), atol=1e-4)
    assert plain.passes == 2 * 3
    with torch.no_grad():
        plain(image[:2])
    assert plain.passes == 2 * 3 + 2
    assert {type(module) for module in plain.open_clip.visual.modules()} != {
        type(module) for module in head.model.image.visual.modules()
    }


def test_both_autoattacks_are_run_on_the_same_samples_with_the_same_verdicts(head, shards):
    config = AutoAttackConfig(
        version="custom", attacks=("apgd-ce", "square"), eps=1 / 255, steps=5, target_classes=1, queries=3
    )
    row, in_bf16 = compare_attacks(head, shards, config, num_samples=20, batch_size=8, rounds=2)
    right = head(_pixels(shards, 20)[0]).argmax(1) == _pixels(shards, 20)[1]
    assert (row.samples, row.clean) == (20, int(right.sum()))
    assert row.clean > 0 and row.robust <= row.clean and row.their_robust <= row.clean
    assert row.differ >= abs(row.robust - row.their_robust)
    # Theirs asks the classifier of each right sample 5 steps and a start with gradients, whatever the outcome.
    assert row.their_passes > row.passes > 0
    assert row.their_passes >= row.clean * 2 * 6
    assert (row.precision, in_bf16.precision) == ("fp32", "bf16")
    assert in_bf16.clean == row.clean and abs(in_bf16.robust - row.robust) <= 1  # verdicts of both are in float32
    assert head.model.image.precision == "fp32"


def test_an_attack_without_budget_breaks_nothing_for_either(head, shards):
    config = AutoAttackConfig(version="custom", attacks=("apgd-ce",), eps=0, steps=2)
    for row in compare_attacks(head, shards, config, num_samples=10, batch_size=4, rounds=1):
        assert row.robust == row.their_robust == row.clean and row.differ == 0


def test_pgd_gives_the_same_classes_with_text_encoded_once_as_anew(model):
    row = compare_prompts(model, num_prompts=12, batch_size=4, steps=2, rounds=2)
    assert row.agree >= 0.9
    assert row.with_text < row.time.cpu_ratio


def test_the_runner_is_timed_with_and_without_decoding(head, shards):
    row = compare_rate(head, shards, num_samples=20, batch_size=8, rounds=2)
    assert row.samples == 20
    assert row.decoded.ours == row.whole.ours == row.bare
    assert row.share(row.whole, "cpu") == pytest.approx(row.bare.cpu_s / row.whole.theirs.cpu_s)
    assert 0 < row.decoding.cpu_s < row.whole.theirs.cpu_s


def test_the_command_prints_rows_and_exits_by_its_bars(tiny_model_name, small_shards, monkeypatch):
    arguments = ["bench", "eval", "--model", tiny_model_name, "--data", str(small_shards), "--parts", "throughput"]
    arguments += ["--num-samples", "2", "--threads", "1", "--check"]
    for bar, code in ((0.0, 0), (1e9, 1)):
        monkeypatch.setattr("zsr.bench.eval_rate.BAR", bar)
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == code, result.output
        found = json.loads(result.stdout)
        assert list(found) == ["throughput"] and found["throughput"]["reached"] is (code == 0)
    table = CliRunner().invoke(app, arguments[:-1])
    assert "missed: throughput" in table.stderr and "of the bare tower's rate" in table.stdout


def test_mistakes_are_sentences(tiny_model_name, monkeypatch, head, shards):
    wrong = CliRunner().invoke(app, ["bench", "eval", "--parts", "autoattack,speed"])
    assert isinstance(wrong.exception, ValueError) and "--parts speed: is not one of" in str(wrong.exception)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        compare_attacks(head, shards, AutoAttackConfig(), num_samples=2, batch_size=2)
    assert explain(missing.value) == ["pyautoattack is not installed; pip install 'zsr[dev]'"]


def _pixels(shards: ShardSet, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    from zsr.data.pipeline import eval_batches

    (batch,) = eval_batches(shards, image_size=32, batch_size=num, num_samples=num)
    return batch.image.float() / 255, batch.label
