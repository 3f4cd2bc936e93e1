"""Accuracy without and with a defence from one attack run, a model served behind a defence, and zsr eval --defense.

Shapes: B images, C channels (or classes, in logits), H x W pixels.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import tiny_clip
from torch import Tensor

from zsr.attacks.base import AttackResult, input_gradients_only
from zsr.attacks.noise import fill_uniform, sample_seeds
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.cli.main import main
from zsr.config import ModelConfig
from zsr.data.pipeline import eval_batches
from zsr.data.shards import ShardSet
from zsr.defenses.ttc import TTC, TTCConfig, relative_shift
from zsr.engine.quick_eval import ZeroShotHead, evaluate
from zsr.eval import DefendedCLIP, evaluate_sets
from zsr.eval.card import find_cards
from zsr.models import RobustCLIP, TextBank, load_model

torch.set_num_threads(1)

TTC_CONFIG = TTCConfig(threshold=0.03)  # the embedded model's images fall on both sides of this gate
ATTACK = PGD(PGDConfig(eps="2/255", step_size="1/255", steps=3))
NUM, SEED = 30, 5


@pytest.fixture(scope="module")
def model() -> RobustCLIP:
    return load_model(ModelConfig(name="zsr:emoji-vit")).eval()


@pytest.fixture(scope="module")
def shards() -> ShardSet:
    return ShardSet("zsr:emoji/train")  # the split on which enough predictions are right for a test to say something


@pytest.fixture(scope="module")
def head(model, shards) -> ZeroShotHead:
    return ZeroShotHead(model, TextBank(model), shards.classes, shards.templates[:1])


def count_one_by_one(head: ZeroShotHead, shards: ShardSet) -> dict[str, int]:
    """What an oblivious evaluation counts, a sample at a time and from the pieces alone."""
    tower, ttc = head.model.image, TTC(TTC_CONFIG)
    found = dict.fromkeys(("clean", "robust", "defended clean", "defended robust", "triggered", "rescued"), 0)
    for batch in eval_batches(shards, image_size=64, batch_size=1, num_samples=NUM):
        image, label = batch.image.float() / 255, int(batch.label)
        noise = fill_uniform(image, sample_seeds(batch.key, "defense", SEED))

        def bare(image: Tensor) -> int:
            with torch.no_grad():
                return int((tower(image).embed_BD @ head.text_CD.T).argmax())

        def loss(image: Tensor, label_B: Tensor = batch.label) -> Tensor:
            return F.cross_entropy(head.model.logit_scale * tower(image).embed_BD @ head.text_CD.T, label_B)[None]

        with input_gradients_only(tower):
            attacked = ATTACK.perturb(loss, image, sample_seeds(batch.key, "eval", SEED)).image_BCHW
        defended_clean = bare(ttc.purify(tower, tower, image, noise)) == label
        defended_attacked = bare(ttc.purify(tower, tower, attacked, noise)) == label
        clean, still = bare(image) == label, bare(attacked) == label
        found["clean"] += clean
        found["robust"] += clean and still
        found["defended clean"] += defended_clean
        found["defended robust"] += defended_clean and defended_attacked
        found["rescued"] += defended_clean and defended_attacked and not still
        with torch.no_grad():
            shift = relative_shift(tower((image + noise * 4 / 255).clamp(0, 1)).raw_BD, tower(image).raw_BD)
        found["triggered"] += bool(shift < TTC_CONFIG.threshold)
    return found


def test_counts_equal_those_of_one_sample_at_a_time_in_any_batch_size(model, head, shards):
    expected = count_one_by_one(head, shards)
    assert 0 < expected["triggered"] < NUM and expected["rescued"] > 0  # else the test could not fail
    for batch_size in (7, NUM):
        bare, behind = evaluate_sets(
            model, [shards], {"pgd": ATTACK, "again": ATTACK},
            num_samples=NUM, batch_size=batch_size, seed=SEED, defended=DefendedCLIP(model, TTC_CONFIG, seed=SEED),
        )  # fmt: skip
        for row in (bare, behind):
            assert row.robust["again"] == row.robust["pgd"]  # one attack leaves nothing behind for the next
            assert len(row.findings) == len({finding.id for finding in row.findings}), "what both show is said once"
        training = evaluate(head, shards, ATTACK, num_samples=NUM, seed=SEED)
        assert (bare.clean.value, bare.robust["pgd"].value) == (training.clean_acc, training.robust_acc)
        assert bare.zero_grad_frac["pgd"] == training.zero_grad_frac
        counts = [bare.clean, bare.robust["pgd"], behind.clean, behind.robust["pgd"]]
        names = ["clean", "robust", "defended clean", "defended robust"]
        assert [round(share.value * NUM) for share in counts] == [expected[name] for name in names]
        assert behind.clean.num_samples == NUM and behind.chance == 1 / len(shards.classes)


class Constant(TTC):
    """Classifies one fixed image, whatever arrives: right for the samples of one class."""

    image_1CHW: Tensor

    def purify(self, victim, frozen, image_BCHW, noise_BCHW):
        return self.image_1CHW.expand_as(image_BCHW)


class Recorder(PGD):
    """Counts the images that it is given, puts one image in their place, and finds that none had a gradient."""

    image_1CHW: Tensor
    num_attacked = 0

    def attack_classifier(self, logits, image_BCHW, label_B, seeds):
        self.num_attacked += len(image_BCHW)
        return AttackResult(self.image_1CHW.expand_as(image_BCHW), torch.ones(len(image_BCHW), dtype=torch.bool))


def test_a_sample_that_only_the_defence_gets_right_is_attacked_too(model):
    shards = ShardSet("zsr:emoji/val")  # concepts that the model was not trained on: most predictions are wrong
    head = ZeroShotHead(model, TextBank(model), shards.classes, shards.templates[:1])
    (batch,) = eval_batches(shards, image_size=64, batch_size=NUM, num_samples=NUM)
    image_BCHW = batch.image.float() / 255
    with torch.no_grad():
        bare_B = head(image_BCHW).argmax(-1)
    wrong = (bare_B != batch.label).nonzero().flatten()
    label = batch.label[wrong[0]]
    defense, attack = Constant(TTC_CONFIG), Recorder(PGDConfig())
    defense.image_1CHW = attack.image_1CHW = _image_taken_for(head, int(label))
    bare, behind = evaluate_sets(
        model, [shards], {"fixed": attack}, num_samples=NUM, defended=DefendedCLIP(model, defense)
    )
    right_B, of_label_B = bare_B == batch.label, batch.label == label
    assert right_B.any() and (of_label_B & ~right_B).any()
    assert attack.num_attacked == (right_B | of_label_B).sum() < NUM
    # Wrong at first and right on the attacked image: that is luck, not robustness.
    assert bare.robust["fixed"].value == pytest.approx((right_B & of_label_B).double().mean().item())
    assert behind.clean == behind.robust["fixed"]
    assert behind.clean.value == pytest.approx(of_label_B.double().mean().item())
    assert bare.zero_grad_frac == behind.zero_grad_frac == {"fixed": 1}
    for row in (bare, behind):
        levels = {finding.id: finding.level for finding in row.findings}
        # No gradient anywhere, and one image in place of all, which is far from nearly all of them.
        assert levels["zero-gradients"] == levels["epsilon-exceeded"] == "fail" and levels["pixel-range"] == "ok"
        assert row.doubts == row.findings[: len(row.doubts)] and row.findings[len(row.doubts)].level in ("note", "ok")
    assert {f.id: f.level for f in behind.findings}["stops-early"] == "ok", "PGD goes on past the bare model's boundary"
    assert "stops-early" not in {finding.id for finding in bare.findings}


def _image_taken_for(head: ZeroShotHead, label: int) -> Tensor:
    """Some image ``[1, C, H, W]`` that the bare model classifies as ``label``."""
    attack = PGD(PGDConfig(eps=1, step_size="8/255", steps=40))
    with input_gradients_only(head.model.image):
        found = attack.perturb(lambda x: head(x).log_softmax(-1)[:, label], torch.full((1, 3, 64, 64), 0.5), [0])
        assert int(head(found.image_BCHW).argmax()) == label
    return found.image_BCHW


def test_without_an_attack_and_over_several_sets(model, shards):
    defended = DefendedCLIP(model, "ttc")
    rows = evaluate_sets(model, [shards, shards], {}, num_samples=3, defended=defended)
    assert [row.defense for row in rows] == [None, "ttc", None, "ttc"]
    assert rows[0].robust == rows[1].robust == {}
    (plain,) = evaluate_sets(model, [shards], {}, num_samples=3)
    assert plain == rows[0]


def test_a_defended_model_gives_the_features_of_purified_images(model, tmp_path):
    tiny, base = tiny_clip(tmp_path / "tiny", seed=0).eval(), tiny_clip(tmp_path / "base", seed=1).eval()
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = fill_uniform(image, sample_seeds(["a", "b", "c"], "defense", 4))
    noisy = (image + noise * 4 / 255).clamp(0, 1)
    with torch.no_grad():
        shifts = [
            relative_shift(tower(noisy).raw_BD, tower(image).raw_BD)[0].item() for tower in (tiny.image, base.image)
        ]
    config = TTCConfig(num_steps=3, threshold=sum(shifts) / 2)  # the two gates disagree on the first image
    defended = DefendedCLIP(tiny, config, frozen=base.image, seed=4)
    expected = TTC(config).purify(tiny.image, base.image, image, noise)
    assert not torch.equal(expected, TTC(config).purify(tiny.image, tiny.image, image, noise))
    assert torch.equal(defended.purify(image, ["a", "b", "c"]), expected)
    features = defended.encode_image(image, ["a", "b", "c"])
    assert torch.equal(features.embed_BD, tiny.encode_image(expected).embed_BD)
    assert not features.embed_BD.requires_grad
    assert defended.own_gate and defended.cost_units == 10
    assert DefendedCLIP(tiny, TTC(config)).cost_units == 8


def test_without_keys_noise_belongs_to_the_images_content(model):
    image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    defended, other_seed = (
        DefendedCLIP(model, TTCConfig(num_steps=0)),
        DefendedCLIP(model, TTCConfig(num_steps=0), seed=1),
    )
    together = defended.purify(image)
    assert torch.equal(together, torch.cat([defended.purify(image[i : i + 1]) for i in range(3)]))
    assert torch.equal(together, defended.purify(image.to(memory_format=torch.channels_last)))
    assert not torch.equal(together, other_seed.purify(image))
    moved = together - image
    assert not torch.equal(moved[0], moved[1])


def test_the_three_lines_of_the_docstring_classify(model):
    image_BCHW = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    defended = DefendedCLIP(model, "ttc", frozen=model.image)
    head = ZeroShotHead(model, TextBank(model), ["cat", "dog"], ["a photo of a {}."])
    logits_BC = head.logits(defended.encode_image(image_BCHW).embed_BD)
    assert logits_BC.shape == (2, 2)
    assert not defended.own_gate
    with pytest.raises(ValueError, match=r"defense=tcc: is not a known defense; did you mean 'ttc'\?"):
        DefendedCLIP(model, "tcc")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


EVAL = ["eval", "--model", "zsr:emoji-vit", "--data", "zsr:emoji/val"]


def test_eval_prints_both_rows_and_says_that_the_attack_is_oblivious(tmp_path: Path, capsys):
    options = ["--eps", "1/255,4/255", "--steps", 1, "--num-samples", 12, "--no-probes"]
    assert call(*EVAL, *options, "--out", tmp_path / "bare") == 0
    assert "oblivious" not in capsys.readouterr().out
    settings = ["--defense-set", "eps=8/255", "--defense-set", "num_steps=1"]
    assert call(*EVAL, *options, "--defense", "ttc", *settings, "--out", tmp_path / "both") == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"emoji/val\W+none", said)) == len(re.findall(r"emoji/val\W+ttc", said)) == 1
    assert "The attack does not know the defence (oblivious): it is crafted on the bare model." in said
    assert re.search(r"victim: zsr:emoji-vit, image tower ([0-9a-f]{12})\n", said)
    assert "gate: the victim's own image tower; if it was fine-tuned, name the model" in said

    bare, both = ({card.id: card for card in find_cards([tmp_path / name])} for name in ("bare", "both"))
    behind = [card for card in both.values() if card.defense is not None]
    assert len(bare) == len(behind) == 2 and len(both) == 4
    for card in behind:
        assert card.attack is not None and card.attack.knowledge == "oblivious"
        assert card.defense is not None and card.defense.cost_units == 4
        expected = TTCConfig().model_dump(exclude={"name"}) | {"eps": 8 / 255, "num_steps": 1}
        assert card.defense.settings == expected
    for key, card in bare.items():  # the same card, whether a defence was measured beside it or not
        assert both[key].attack is not None and both[key].attack.knowledge == "white-box"
        assert (both[key].clean, both[key].robust) == (card.clean, card.robust)
        assert card.cost.clean_passes == both[key].cost.clean_passes == 12  # its own, not half of both judges'
        assert (card.cost.shared_by, both[key].cost.shared_by) == (1, 2)
        assert card.cost.probe_passes == 0
    assert {card.cost.clean_passes for card in behind} == {12 * 4}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--defense", "tcc"], "--defense tcc: is not a known defense; did you mean 'ttc'?"),
        (
            ["--defense", "ttc", "--defense-set", "num_stepz=3"],
            "--defense-set num_stepz=3: there is no such setting; did you mean num_steps?",
        ),
        (["--defense", "ttc", "--defense-set", "eps=4"], "--defense-set eps=4 is more than the whole pixel range"),
        (["--defense", "ttc", "--defense-set", "beta=x"], "--defense-set beta='x': should be a number"),
        (["--defense", "ttc", "--defense-set", "eps"], "--defense-set eps: should be key=value"),
        (["--defense-set", "eps=0"], "--defense-set: needs a defence to belong to; add --defense ttc"),
        (["--gate-model", "zsr:emoji-vit"], "--gate-model: needs a defence to belong to; add --defense ttc"),
        (["--defense", "ttc", "--gate-model", "zsr:emoji-vot"], "is not an embedded model; did you mean 'emoji-vit'?"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(arguments: list[str], says: str, capsys):
    assert call(*EVAL, "--num-samples", 1, *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_gate_of_another_image_size_is_refused(tiny_model_name: str, capsys):
    assert call(*EVAL, "--num-samples", 1, "--defense", "ttc", "--gate-model", tiny_model_name) == 2
    assert "takes images of 32 pixels, the model of 64" in capsys.readouterr().err
