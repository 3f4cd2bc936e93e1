"""The measurement behind zsr eval: verdicts that depend on nothing but the sample, batches that are kept.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_bench import SEED, cascade, make_scene, plain, run_cascade
from shard_factory import make_shards

from zsr.attacks.adaptive import Adaptive, AdaptiveConfig
from zsr.attacks.apgd import APGD, APGDConfig
from zsr.attacks.base import input_gradients_only
from zsr.attacks.checks import judge
from zsr.attacks.noise import sample_seeds
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.data.shards import ShardSet
from zsr.eval import measure
from zsr.eval.defended import DefendedCLIP
from zsr.eval.images import Images
from zsr.eval.ledger import CLEAN, Ledger, Line
from zsr.eval.measure import bf16_finding
from zsr.eval.plan import Job
from zsr.eval.runner import Clean, Moment, Verdicts, classify_clean, run_attack, survivors
from zsr.eval.scene import Request, Scene
from zsr.eval.shares import share_of
from zsr.eval.target import Served, Target, adaptive_target, enlarge
from zsr.models import in_precision

torch.set_num_threads(1)
EMOJI = ("zsr:emoji-vit", "zsr:emoji/train", 64, 16)  # a split on which nearly all is right, so that attacks have work


@pytest.fixture(scope="module")
def emoji():
    return make_scene(*EMOJI)


def test_batches_and_stages_over_the_whole_set_change_no_verdict(emoji):
    attack = cascade("2/255")
    clean, verdicts = run_cascade(emoji, attack, batch_size=5)
    assert 0 < (verdicts.stage == 0).sum() < verdicts.attacked.sum()  # some fall at once, some go on
    assert plain(clean, verdicts) == plain(*run_cascade(emoji, attack, batch_size=16))

    # AutoAttack's own cascade, on one batch.
    rows = np.flatnonzero(verdicts.attacked)
    batch = emoji.images.batch(emoji.images.ids[rows].tolist())
    with input_gradients_only(emoji.target.seen.head.model.image):
        found = attack.attack_classifier(
            emoji.target.seen, batch.image.float() / 255, batch.label, sample_seeds(batch.key, "eval", SEED)
        )
        pred_B = emoji.target.seen(found.image_BCHW).argmax(-1)
    assert verdicts.stage[rows].tolist() == found.stage_B.tolist()
    assert verdicts.pred["bare"][rows].tolist() == pred_B.tolist()
    assert verdicts.zero_grad[rows].tolist() == found.zero_grad_B.tolist()


def test_only_survivors_go_on_in_full_batches(emoji):
    ledger, attack = Ledger(None, ""), cascade("2/255")
    clean = classify_clean(emoji, {"bare": Ledger(None, "")})
    told: list[Moment] = []
    verdicts = run_attack(emoji, attack, clean, ledger, batch_size=4, tell=told.append)
    standing = set(emoji.images.ids[verdicts.attacked].tolist())
    for stage, name in enumerate(attack.stages):
        lines = [line for line in ledger.lines if line.stage == stage]
        assert {sample for line in lines for sample in line.ids} == standing
        assert all(len(line.ids) == 4 for line in lines[:-1])
        moments = [moment for moment in told if moment.stage == name]
        assert [moment.done for moment in moments] == np.cumsum([len(line.ids) for line in lines]).tolist()
        standing -= {s for line in lines for s, success in zip(line.ids, line.success, strict=True) if success}
        assert not moments or moments[-1].total - moments[-1].over == len(standing)
    after = survivors(attack, clean, verdicts, emoji.images.label, "bare")
    assert list(after) == list(attack.stages)
    assert after["square"].count == len(standing)


def test_facts_count_each_attacked_sample_once(emoji):
    clean, verdicts = run_cascade(emoji, cascade("2/255"), batch_size=5)
    lines = [*clean.lines["bare"], *verdicts.lines]
    findings = {finding.id: finding for finding in judge(emoji.facts(cascade("2/255"), lines, "bare"))}
    num = int(verdicts.attacked.sum())
    for check in ("zero-gradients", "pixel-range", "epsilon-exceeded"):
        assert findings[check].level == "ok" and f"none of {num} attacked" in findings[check].sentence
    assert findings["label-range"].sentence.startswith(f"none of {len(emoji.images)} ")
    assert sum(line.passes for line in clean.lines["bare"]) == len(emoji.images)


def test_pgd_costs_two_passes_a_step_and_one_to_judge(emoji):
    clean = classify_clean(emoji, {"bare": Ledger(None, "")})
    attack = PGD(PGDConfig(eps="1/255", step_size="1/255", steps=3))
    verdicts = run_attack(emoji, attack, clean, Ledger(None, ""))
    assert sum(line.passes for line in verdicts.lines) == (2 * 3 + 1) * int(verdicts.attacked.sum())


def test_epsilon_applies_at_the_size_that_is_attacked(tiny_model_name, tmp_path):
    make_shards(tmp_path / "small", num_samples=12, num_classes=2, image_size=16)
    scene = make_scene(tiny_model_name, tmp_path / "small", pixels=16)
    assert scene.target.seen.head.model.image_size == 32
    clean = classify_clean(scene, {"bare": Ledger(None, "")})
    kept: dict[int, np.ndarray] = {}
    attack = PGD(PGDConfig(eps="8/255", step_size="8/255", steps=2))
    run_attack(scene, attack, clean, Ledger(None, ""), keep=lambda line, images: kept.update(images), num_keep=4)
    assert len(kept) == 4
    for sample, image_CHW in kept.items():
        moved = np.abs(image_CHW - scene.images.batch([sample]).image[0].numpy() / 255)
        assert image_CHW.shape == (3, 16, 16)
        assert 8 / 255 - 1e-3 < moved.max() < 8 / 255 + 1e-6
    image_BCHW = torch.rand(2, 3, 16, 16, requires_grad=True)
    larger_BCHW = enlarge(image_BCHW, 32)
    assert larger_BCHW.shape == (2, 3, 32, 32)
    larger_BCHW.sum().backward()
    assert image_BCHW.grad is not None and bool((image_BCHW.grad > 0).all())
    same_BCHW = torch.rand(1, 3, 32, 32)
    assert enlarge(same_BCHW, 32) is same_BCHW


def test_images_are_decoded_once_and_labels_read_without_them(tmp_path, monkeypatch):
    shards = ShardSet(make_shards(tmp_path / "set", num_samples=20, image_size=16))
    images = Images(shards, 16, num_samples=7)
    assert images.label.tolist() == [sample % 4 for sample in images.ids.tolist()]
    read: list[int] = []
    real = ShardSet.read
    monkeypatch.setattr(
        ShardSet, "read", lambda self, sample, only=None: read.append(sample) or real(self, sample, only)
    )
    ids = images.ids.tolist()
    first, again = images.batch(ids[:4]), images.batch(ids[2:])
    assert torch.equal(first.image[2:], again.image[:2])
    assert sorted(read) == ids
    assert [images.keys[sample] for sample in ids[:4]] == first.key
    assert Images(shards, 16, num_samples=6).digest != images.digest == Images(shards, 32, num_samples=7).digest


def test_a_ledger_drops_a_torn_line_and_nothing_else(tmp_path):
    path = tmp_path / "ledger"
    lines = [
        Line(0, [1, 2], {"bare": [3, 4]}, success=[True, False], zero_grad=[False, False]),
        Line(1, [2], {"bare": [4]}),
    ]
    with Ledger(path, "card") as ledger:
        for line in lines:
            ledger.append(line)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"stage":1,"ids":[5')
    with Ledger(path, "card") as ledger:
        assert ledger.lines == lines
        ledger.append(lines[1])
        with pytest.raises(ValueError, match="another zsr eval writes to it"):
            Ledger(path, "card")
    assert path.read_bytes() == whole + whole.splitlines(keepends=True)[-1]
    with pytest.raises(ValueError, match="belongs to another measurement"):
        Ledger(path, "other card")


def test_few_survivors_among_many_images_are_those_that_are_probed(tiny_model_name, small_shards):
    scene = make_scene(tiny_model_name, small_shards)
    label = scene.images.label
    last = sorted(range(len(label)), key=lambda row: scene.images.keys[int(scene.images.ids[row])])[-3:]
    left = np.where(np.isin(np.arange(len(label)), last), label, (label + 1) % len(scene.class_names))
    right, none = np.ones(len(label), dtype=bool), np.zeros(len(label), dtype=bool)
    job = Job(Path(), PGD(PGDConfig(eps="64/255", step_size="16/255", steps=2)), {})
    verdicts = Verdicts(right, {"bare": left}, np.zeros(len(label)), none, [])
    found = {f.id: f for f in measure._probe(scene, job, "bare", Clean({"bare": label}, {"bare": []}), verdicts)}
    for check in ("black-box", "weak-beats-strong"):
        assert "of 3 images that stand after the attack" in found[check].sentence.replace("none of", "of")


@pytest.mark.parametrize(("share", "grave"), [(0.0, {"ok"}), (0.5, {"warn", "fail"})])
def test_probes_look_at_the_random_model_that_was_attacked(tiny_model_name, small_shards, share, grave):
    scene = make_scene(tiny_model_name, small_shards, num_samples=8, attention_drop=share)
    clean = classify_clean(scene, {"bare": Ledger(None, "")})
    attack = PGD(PGDConfig(eps="1/255", step_size="1/255", steps=1))
    verdicts = run_attack(scene, attack, clean, Ledger(None, ""))
    clean = Clean({"bare": scene.images.label}, {"bare": []})  # whatever it answers, there is something to look at
    found = {f.id: f.level for f in measure._probe(scene, Job(Path(), attack, {}), "bare", clean, verdicts)}
    assert found["randomised"] in grave


class Queued(torch.Tensor):
    """Numbers of a device that has not computed them yet: who reads them waits."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist:
            time.sleep(0.3)
        return super().__torch_function__(func, types, args, kwargs)


def test_seconds_end_when_the_predictions_are_there(tiny_model_name, small_shards):
    scene = make_scene(tiny_model_name, small_shards, num_samples=2)
    slow = Served(lambda x: scene.target.seen.head(x).as_subclass(Queued))
    slow.head.model = scene.target.seen.head.model
    queued = Scene(
        scene.images, Target(scene.target.seen, {"bare": slow}, {"bare": "white-box"}), scene.class_names, device="cpu"
    )
    request = Request(CLEAN, scene.images.ids.tolist(), ("bare",))
    assert scene.do(request).line.pred == queued.do(request).line.pred
    assert scene.do(request).line.seconds < 0.3 <= queued.do(request).line.seconds


def test_the_mean_over_classes_weighs_classes_alike():
    right, label = np.array([True, True, True, False]), np.array([0, 0, 0, 2])
    share = share_of(right, label, by_class=True)
    assert (share.count, share.total, share.value) == (3, 4, 0.5)
    assert share_of(right, label).value == 0.75
    assert share.low < share.value < share.high


def test_a_bf16_run_says_what_float32_thinks_of_it():
    lines = [
        Line(0, [1, 2, 3], {"bare": [0, 0, 1]}, success=[False, False, True], redone=2),
        Line(1, [1, 2], {"bare": [0, 1]}, success=[False, True]),
    ]
    for fell, level in ((0, "ok"), (1, "warn"), (2, "fail")):
        finding = bf16_finding(lines, 10, fell)
        assert (finding.level, finding.value) == (level, fell / 10)
        assert finding.sentence == (
            f"of 10 survivors attacked again in float32 {fell} fell; 2 fell to the attack itself, which took float32 for 2 "
            "samples, given up too early in bfloat16"
        )


def test_verdicts_of_a_bf16_run_are_those_of_float32(emoji):
    """What the attack believes in bfloat16 does not count: neither a success that is none, nor a miss that is a hit."""
    tower = emoji.target.seen.head.model.image
    attack = APGD(APGDConfig(eps="2/255", steps=20))
    exact = classify_clean(emoji, {"bare": Ledger(None, "")})
    with in_precision("bf16", [tower]):
        clean = classify_clean(emoji, {"bare": Ledger(None, "")})
        verdicts = run_attack(emoji, attack, clean, Ledger(None, ""))
        assert tower.precision == "bf16"
    assert (clean.pred["bare"] == exact.pred["bare"]).all()
    (line,) = verdicts.lines
    label = dict(zip(emoji.images.ids.tolist(), emoji.images.label.tolist(), strict=True))
    assert any(line.success)
    assert line.success == [pred != label[sample] for sample, pred in zip(line.ids, line.pred["bare"], strict=True)]


def test_what_bfloat16_gives_up_too_early_is_attacked_again_in_float32(emoji):
    """A bfloat16 classifier that is wrong everywhere stops the attack at once; float32 is not impressed."""
    batch = emoji.images.batch(emoji.images.ids.tolist()[:6])
    image_BCHW, seeds = batch.image.float() / 255, sample_seeds(batch.key, "eval", 0)
    tower, attack = emoji.target.seen.head.model.image, APGD(APGDConfig(eps="1/255", steps=3))
    with torch.no_grad():
        label_B = emoji.target.seen(image_BCHW).argmax(1)
    encode = tower._encode_vit

    def other_way_round(x: torch.Tensor, tokens: bool) -> tuple[torch.Tensor, ...]:
        raw_BD, *others = encode(x, tokens)
        return (-raw_BD if tower.precision == "bf16" else raw_BD, *others)

    with emoji.still():
        expected, redone = emoji.attack(attack, image_BCHW, label_B, seeds)
        assert redone == 0
        tower._encode_vit = other_way_round
        try:
            with in_precision("bf16", [tower]):
                found, redone = emoji.attack(attack, image_BCHW, label_B, seeds)
        finally:
            del tower._encode_vit
    assert redone == 6
    assert found.success_B.tolist() == expected.success_B.tolist()
    torch.testing.assert_close(found.image_BCHW, expected.image_BCHW)


def test_a_success_over_a_defence_is_not_measured_by_the_bare_classifier(emoji):
    head = emoji.target.seen.head
    target = adaptive_target(head, DefendedCLIP(head.model, "ttc"), head.model.image_size)
    scene = Scene(emoji.images, target, emoji.class_names, device="cpu")
    batch = emoji.images.batch(emoji.images.ids.tolist()[:6])
    image_BCHW, seeds = batch.image.float() / 255, sample_seeds(batch.key, "eval", 0)
    label_B = (batch.label + 1) % len(emoji.class_names)  # wrong everywhere: each draw is a success from the start
    attack = Adaptive(AdaptiveConfig(eps="1/255", steps=1, eot=1))
    with scene.still(), in_precision("bf16", [head.model.image]):
        found, redone = scene.attack(attack, image_BCHW, batch.label, seeds)
        own = target.attack(attack, image_BCHW, batch.label, seeds)
        fooled, _ = scene.attack(attack, image_BCHW, label_B, seeds)
    assert redone == 0 and found.success_B.tolist() == own.success_B.tolist()
    assert fooled.success_B.all()
