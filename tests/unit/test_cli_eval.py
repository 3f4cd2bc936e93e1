"""zsr eval as a person calls it: cards written and found again, suites, plans, and sentences for what is missing."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_factory import encode_image, make_image, make_shards, write_tar

from zsr.attacks.checks import PROBES
from zsr.cli.main import main
from zsr.config import ModelConfig
from zsr.data.storage import EMBEDDED
from zsr.eval.card import ResultCard, card_schema, find_cards
from zsr.models import load_model
from zsr.models.export import export_open_clip

torch.set_num_threads(1)
FAST = ["--steps", 1, "--no-probes"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ZSR_CACHE", str(tmp_path / "cache"))


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def cards_in(folder: Path) -> list[ResultCard]:
    return find_cards([folder])


def test_a_card_lies_where_its_names_say_and_is_not_measured_twice(tiny_model_name, small_shards, tmp_path, capsys):
    order = ["eval", "--model", tiny_model_name, "--data", small_shards, "--eps", "1/255", *FAST]
    assert call(*order, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("to do: ") == 1 and not (tmp_path / "home").exists()
    assert call(*order) == 0
    table = capsys.readouterr().out
    (path,) = (tmp_path / "home" / ".zsr" / "results").rglob("*.card.json")
    (card,) = cards_in(tmp_path / "home")
    assert path.name == f"pgd-1-255-{card.id}.card.json" and card.id in said
    assert path.parent.parent.name == f"{card.model.label}-{card.model.weights_digest}"
    assert path.parent.name.endswith(f"{card.dataset.split}") and "small" in path.parent.name
    assert (path.parent / f"{card.id}.verdicts.jsonl").is_file()
    assert card.dataset.samples == card.dataset.of == 50 and card.dataset.classes == 5
    assert card.clean.total == 50 and card.robust is not None and card.robust.count <= card.clean.count
    assert card.robust.low < card.robust.value < card.robust.high
    assert "unexpected-count" not in {finding.id for finding in card.checks}, "the set is in no registry"
    assert card.cost.encoder_passes == 50 + 4 * card.clean.count  # PGD-1: forward, backward, its end, the judge
    assert {"zsr", "torch", "open_clip", "commit"} <= set(card.environment)

    before = path.read_bytes()
    assert call(*order) == 0
    again = capsys.readouterr()
    assert f"there already: {path.name}" in again.err and again.out == table
    assert path.read_bytes() == before
    assert call(*order, "--seed", 1, "--dry-run") == 0
    assert "to do: " in capsys.readouterr().out

    found = np.load(path.parent / f"{card.id}.examples.npz")
    assert found["clean"].shape == found["attacked"].shape == (min(8, card.clean.count), 32, 32, 3)
    assert found["clean"].dtype == np.uint8 and found["attacked"].dtype == np.float32
    assert np.abs(found["attacked"] - found["clean"] / 255).max() <= 1 / 255 + 1e-6
    assert found["key"].tolist() == sorted(found["key"].tolist())
    assert (found["clean_pred"] == found["label"]).all() and found["class_names"].tolist()[4] == "class 4"


def test_clean_predictions_are_shared_by_all_attacks_and_budgets(tiny_model_name, small_shards, tmp_path):
    order = ["eval", "--model", tiny_model_name, "--data", small_shards, "--out", tmp_path, *FAST, "--num-samples", 10]
    assert call(*order, "--eps", "1/255,2/255", "--attack", "pgd", "--attack", "cw") == 0
    ledgers = list(tmp_path.rglob("*.verdicts.jsonl"))
    attacks = [json.loads(path.read_text().splitlines()[0])["attack"] for path in ledgers]
    assert sorted(attacks) == ["CW-1 1/255", "CW-1 2/255", "PGD-1 1/255", "PGD-1 2/255", "none"]
    assert call(*order, "--attack", "none") == 0
    (clean,) = (card for card in cards_in(tmp_path) if card.attack is None)
    assert clean.robust is None and len(list(tmp_path.rglob("*.verdicts.jsonl"))) == 5


def test_an_adaptive_attack_and_attacks_around_the_text_are_other_columns(tmp_path, capsys):
    order = ["eval", "--model", "zsr:emoji-vit", "--data", "emoji_test_style", "--num-samples", 6, "--eps", "4/255"]
    order += [*FAST, "--out", tmp_path, "--defense", "ttc"]
    assert call(*order, "--attack", "pgd", "--attack", "adaptive", "--attack-set", "adaptive.eot=1") == 0
    assert call(*order, "--craft-superclasses") == 0
    assert call(*order, "--craft-template", "the sign of {}") == 0
    cards = cards_in(tmp_path)
    seen = sorted((card.attack.name, card.attack.knowledge, card.attack.crafted_on) for card in cards if card.attack)
    texts = ("served", "superclasses", "the prompt 'the sign of {}'")
    plain = [("pgd", knowledge, words) for knowledge in ("white-box", "oblivious") for words in texts]
    assert seen == sorted([("adaptive", "adaptive", "served"), *plain])
    assert len({card.column for card in cards}) == 7
    # Six images of it were asked for; the set itself has all that it should have.
    assert all({f.id: f.level for f in card.checks}["unexpected-count"] == "ok" for card in cards)
    assert {card.dataset.key for card in cards} == {"emoji_test_style"}
    capsys.readouterr()


def test_an_embedded_set_is_the_same_by_its_address_and_by_its_key(capsys):
    order = ["eval", "--model", "zsr:emoji-vit", "--num-samples", 4, "--dry-run", "--craft-superclasses"]
    plans = []
    for names in ("zsr:emoji/test_both,zsr:emoji/test_style/", "emoji_test_both,emoji_test_style"):
        assert call(*order, "--data", names) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1] and "emoji_test_style (4 samples)" in plans[0]
    assert call(*order) == 0  # the default sets
    assert plans[0].count("to do: ") == 6 and capsys.readouterr().out.startswith(plans[0].splitlines()[0])


def test_an_attack_that_stops_at_another_heads_boundary_is_not_believed_without_a_word(tmp_path, capsys):
    order = ["eval", "--model", "zsr:emoji-vit", "--data", "emoji_test_style", "--num-samples", 4, "--eps", "4/255"]
    order += ["--no-probes", "--out", tmp_path, "--defense", "ttc", "--attack-set", "apgd.steps=1", "--steps", 1]
    assert call(*order, "--attack", "pgd", "--attack", "apgd") == 0
    capsys.readouterr()
    levels = {
        (card.attack.name, card.attack.knowledge): {f.id: f.level for f in card.checks}.get("stops-early")
        for card in cards_in(tmp_path)
        if card.attack
    }
    assert levels == {
        ("pgd", "white-box"): None,
        ("apgd", "white-box"): None,
        ("pgd", "oblivious"): "ok",
        ("apgd", "oblivious"): "warn",
    }


@pytest.mark.parametrize("name", ["aa", "autoattack", "apgd", "fab", "square"])
def test_crafting_refuses_an_attack_that_stops_at_the_crafted_heads_boundary(name, capsys):
    for craft in (["--craft-superclasses"], ["--craft-template", "a {}"]):
        assert call("eval", "--model", "zsr:emoji-vit", "--attack", name, *craft) == 2
        said = capsys.readouterr().err
        assert craft[0] in said and "its number flatters; compare under pgd or cw" in said


def test_a_card_has_the_probes_of_its_own_classifier_or_says_that_it_has_none(tiny_model_name, small_shards, tmp_path):
    order = ["eval", "--model", tiny_model_name, "--data", small_shards, "--num-samples", 8, "--eps", "1/255"]
    order += ["--steps", 1, "--defense", "ttc", "--out", tmp_path]
    assert call(*order, "--attack", "pgd", "--attack", "adaptive", "--attack-set", "adaptive.eot=1") == 0
    assert call(*order, "--craft-template", "the sign of {}") == 0
    assert call(*order, "--seed", 1, "--no-probes") == 0
    found = {}
    for card in cards_in(tmp_path):
        assert card.attack is not None and card.clean.count > 0
        ids = {finding.id for finding in card.checks} & {*PROBES, "not-probed"}
        found[card.attack.knowledge, card.attack.crafted_on == "served", card.seed] = ids
    nothing = {"not-probed"}
    assert found == {
        ("white-box", True, 0): set(PROBES),
        ("oblivious", True, 0): nothing,
        ("adaptive", True, 0): {"black-box", *nothing},
        ("white-box", False, 0): nothing,
        ("oblivious", False, 0): nothing,
        ("white-box", True, 1): nothing,
        ("oblivious", True, 1): nothing,
    }


def test_a_card_without_probes_is_not_in_the_way_of_one_with_them(tiny_model_name, small_shards, tmp_path, capsys):
    order = ["eval", "--model", tiny_model_name, "--data", small_shards, "--num-samples", 8, "--eps", "1/255"]
    order += ["--steps", 1, "--defense", "ttc", "--out", tmp_path]

    def found() -> dict[str, tuple[Any, set[str]]]:
        """Of each judge: what was counted, and which probes there are."""
        return {
            card.attack.knowledge: ((card.id, card.clean, card.robust), {f.id for f in card.checks} & set(PROBES))
            for card in cards_in(tmp_path)
            if card.attack
        }

    def ledgers() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*.verdicts.jsonl")}

    assert call(*order, "--no-probes") == 0
    before, kept = found(), ledgers()
    assert {probes == set() for _, probes in before.values()} == {True}
    assert call(*order, "--dry-run") == 0
    assert "to do: " in capsys.readouterr().out
    assert call(*order) == 0
    after = found()
    assert after["white-box"][1] == set(PROBES)
    assert {name: counts for name, (counts, _) in after.items()} == {
        name: counts for name, (counts, _) in before.items()
    }
    assert ledgers() == kept, "no verdict is made again"
    capsys.readouterr()
    for more in ([], ["--no-probes"]):
        assert call(*order, *more) == 0
        assert "there already: " in capsys.readouterr().err
    assert found() == after


def write_published(root: Path, name: str, classes: list[str], sizes: list[int], labels: list[int]) -> None:
    """A set as CLIP_benchmark publishes it, of 32-pixel images."""
    folder = root / name / "test"
    folder.mkdir(parents=True)
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        samples = []
        for number in (next(numbers) for _ in range(size)):
            image = encode_image(make_image(number, 32, 32), "png")
            samples.append((f"s{number:04d}", {"png": image, "cls": str(labels[number]).encode()}))
        write_tar(folder / f"{shard}.tar", samples)
    (folder.parent / "classnames.txt").write_text("".join(f"{one}\n" for one in classes))
    (folder.parent / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}.\n")


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


@pytest.fixture
def suite(tmp_path: Path) -> list[object]:
    """Options for a protocol of three sets, two of which are there."""
    labels = [0] * 12 + [number % 10 for number in range(12)]
    write_published(tmp_path / "sets", "wds_vtab-cifar10", CIFAR, [10, 14], labels)
    write_published(tmp_path / "sets", "wds_stl10", STL, [24], labels)
    own = tmp_path / "own.yaml"
    own.write_text(
        "key: own\ntitle: own\nsource: a test\ndatasets: {cifar10: test, stl10: test, pcam: test}\nprompts: [own]\n"
        "metric: mean_per_class\nattack_resolution: native\nnormalization: own\npreprocessing: own\n"
        "training_set: null\naverages: {all: [], without_chance_level: [chance_level]}\nattacks: []\n"
    )
    return ["--suite", own, "--root", tmp_path / "sets"]


def test_a_suite_is_measured_as_its_protocol_says(suite, tiny_model_name, tmp_path, capsys):
    order = ["eval", "--model", tiny_model_name, *suite, "--eps", "2/255", *FAST]
    assert call(*order, "--out", tmp_path / "cards") == 0
    said = capsys.readouterr().out
    assert "missing: PatchCamelyon (PCAM) (test) is not under" in said
    assert "mean of 2 of 3 " in said and "mean of 2, without chance level" in said
    cards = {card.dataset.key: card for card in cards_in(tmp_path / "cards")}
    assert sorted(cards) == ["cifar10", "stl10"]
    cifar = cards["cifar10"]
    assert cifar.dataset.templates == ["a photo of a {}.", "a {}."] and cifar.dataset.split == "test"
    assert (cifar.protocol.suite, cifar.protocol.metric, cifar.protocol.resolution) == (
        "own",
        "mean_per_class",
        "native",
    )
    assert cifar.dataset.pixels == 32 and cards["stl10"].dataset.pixels == 96
    counts = next(finding for finding in cifar.checks if finding.id == "unexpected-count")
    assert (counts.level, counts.sentence) == ("warn", "cifar10 (test) has 24 samples, 10000 are expected")
    assert "warn: cifar10 pgd 2/255: unexpected-count: cifar10 (test) has 24 samples" in " ".join(said.split())
    for card in cards.values():
        assert card.robust is not None
        # Half of the samples are of class 0: the mean over classes is not the mean over samples.
        (ledger,) = (
            path for path in (tmp_path / "cards").rglob("*.jsonl") if '"attack":"none"' in path.read_text()
            and f'"set":"{card.dataset.key}"' in path.read_text()
        )  # fmt: skip
        lines = [json.loads(line) for line in ledger.read_text().splitlines()[1:]]
        pred = {s: p for line in lines for s, p in zip(line["ids"], line["pred"]["bare"], strict=True)}
        label = [0] * 12 + [number % 10 for number in range(12)]
        right = [[pred[s] == label[s] for s in range(24) if label[s] == one] for one in range(10)]
        assert card.clean.value == pytest.approx(sum(sum(rows) / len(rows) for rows in right) / 10)
        assert card.clean.count == sum(map(sum, right))

    assert call(*order, "--strict", "--out", tmp_path / "strict") == 2
    assert "hf download --repo-type dataset clip-benchmark/wds_vtab-pcam" in capsys.readouterr().err
    assert call(*order, "--dry-run", "--out", tmp_path / "plan") == 0
    said = capsys.readouterr().out
    assert said.count("to do: ") == 2 and "missing: Patch" in said and not (tmp_path / "plan").exists()


def test_a_suite_named_alone_is_attacked_as_its_protocol_says(suite, tiny_model_name, capsys):
    own = suite[1]
    own.write_text(own.read_text().replace("attacks: []", "attacks: [{name: cw, eps: [3/255], unknown: [steps]}]"))
    assert call("eval", "--model", tiny_model_name, *suite, "--dry-run") == 0
    said = capsys.readouterr()
    assert said.out.count("CW-10 linf 3/255") == said.out.count("to do: ") == 2
    assert "suite own: steps of cw are not known; zsr's own are taken" in said.err
    assert call("eval", "--model", tiny_model_name, *suite, "--dry-run", "--attack", "pgd") == 0
    assert capsys.readouterr().out.count("PGD-10") == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--model: names no model"),
        (["--model", "zsr:emoji-vit", "--data", " , "], "--data: names no set"),
        (["--model", "zsr:emoji-vit", "--data", "cifar10"], "--data cifar10 (test): say with --root which folder"),
        (["--model", "zsr:emoji-vit", "--suite", "tga"], "tga is not a known suite"),
        (["--model", "zsr:emoji-vit", "--suite", "fare13"], "--suite fare13: none of its sets is there"),
        (["--model", "zsr:emoji-vit", "--suite", "embedded", "--template", "a {}"], "--template: the prompts are the suite's"),
        (["--model", "zsr:emoji-vit", "--template", "a"], "--template 'a': needs {}"),
        (["--model", "zsr:emoji-vit", "--attack", "none", "--attack", "pgd"], "--attack none: stands alone"),
        (["--model", "zsr:emoji-vit", "--attack", "adaptive"], "--attack adaptive: needs a defence to know"),
        (["--model", "zsr:emoji-vit", "--craft-template", "a"], "--craft-template 'a': needs {}"),
        (["--model", "zsr:emoji-vit", "--attack", "none", "--craft-superclasses"], "--craft-superclasses: needs an attack"),
        (["--model", "zsr:emoji-vit", "--log", "--dry-run"], "--log: zsr:emoji-vit is no run's folder"),
        (["--model", "zsr:emoji-vit", "--mlflow-run", "a", "--dry-run"], "--mlflow-run a: tracking.uri is empty"),
        (["--model", "zsr:emoji-vit", "--tracking-uri", "sqlite:///a.db"], "nothing is put there without --mlflow-run"),
        (["--model", "zsr:emoji-vit", "--pretrained", "openai"], "--pretrained openai: zsr:emoji-vit brings its own weights"),
        (["--model", "zsr:emoji-vit", "--device", "gpu"], "--device gpu: torch has no such device here; it has cpu"),
        (["--model", "zsr:emoji-vit", "--device", "cuda:77"], "--device cuda:77: torch has no such device here"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_a_sentence_before_anything_is_measured(options, says, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert call("eval", *options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_a_card_of_other_bytes_is_named(tmp_path):
    (tmp_path / "a.card.json").write_bytes(b"\xff\xfe\x00card")
    with pytest.raises(ValueError, match=r"a\.card\.json is no result card"):
        cards_in(tmp_path)


def test_the_schema_is_printed(capsys):
    assert call("eval", "schema") == 0
    assert json.loads(capsys.readouterr().out) == card_schema()


def independent_accuracy(folder: Path) -> list[bool]:
    """What open_clip's own functions have right on the emoji test_style set: its model, preprocessing and tokenizer."""
    import open_clip

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    place = EMBEDDED / "emoji" / "test_style"
    index: dict[str, Any] = json.loads((place / "index.json").read_text())
    classifier_DC = open_clip.build_zero_shot_classifier(
        model,
        open_clip.get_tokenizer(name),
        index["classes"],
        [lambda one, template=template: template.format(one) for template in index["templates"][:1]],
        num_classes_per_batch=None,
    )
    right: list[bool] = []
    for shard in index["shards"]:
        pixels, labels = [], []
        with tarfile.open(place / shard["file"]) as tar:
            for member in tar.getmembers():
                content = tar.extractfile(member).read()
                if member.name.endswith(".cls"):
                    labels.append(int(content))
                elif not member.name.endswith((".json", ".txt")):
                    pixels.append(preprocess(Image.open(io.BytesIO(content)).convert("RGB")))
        with torch.no_grad():
            image_BD = model.encode_image(torch.stack(pixels), normalize=True)
        right += ((image_BD @ classifier_DC).argmax(1) == torch.tensor(labels)).tolist()
    return right


def test_open_clips_own_checkpoint_and_our_export_are_as_accurate_here_as_in_open_clip(tmp_path):
    import open_clip
    from open_clip.push_to_hf_hub import save_for_hf

    model = load_model(ModelConfig(name="zsr:emoji-vit"))
    with torch.no_grad():  # another model than the embedded one, on both sides of the text map
        noise = torch.Generator().manual_seed(0)
        for weight in (model.image.visual.proj, model.text_projection):
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=noise)
    exported = export_open_clip(model, tmp_path / "exported")

    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    with torch.no_grad():
        theirs.visual.proj *= 1 + 0.2 * torch.randn(theirs.visual.proj.shape, generator=noise)
    saved = tmp_path / "saved"

    class Tokenizer:
        """open_clip's own has no files; its saver asks for them all the same."""

        def save_pretrained(self, folder: Path) -> None: ...

    save_for_hf(theirs, Tokenizer(), model.architecture, save_directory=saved)
    assert (saved / "open_clip_config.json").is_file() and (saved / "open_clip_model.safetensors").is_file()

    counts = []
    for folder in (exported, saved):
        right = independent_accuracy(folder)
        out = tmp_path / f"cards-{folder.name}"
        assert call("eval", "--model", folder, "--data", "zsr:emoji/test_style", "--attack", "none", "--out", out) == 0
        (card,) = cards_in(out)
        (ledger,) = out.rglob("*.verdicts.jsonl")
        lines = [json.loads(line) for line in ledger.read_text().splitlines()[1:]]
        index = json.loads((EMBEDDED / "emoji" / "test_style" / "index.json").read_text())
        assert len(right) == card.clean.total == index["samples"] == 753
        assert card.clean.count == sum(right)
        assert sum(len(line["ids"]) for line in lines) == 753
        counts.append(card.clean.count)
    assert counts[0] != counts[1]


def test_a_folder_of_shards_may_be_measured_by_address(tiny_model_name, tmp_path):
    make_shards(tmp_path / "set", num_samples=6, num_classes=2, image_size=32)
    assert call("eval", "--model", tiny_model_name, "--data", tmp_path / "set", "--attack", "none") == 0
    (card,) = cards_in(tmp_path / "home")
    assert card.dataset.key == card.dataset.address == str(tmp_path / "set")
