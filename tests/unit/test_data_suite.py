"""The registry of test sets and protocols: every file is sound, and says what METHODS.md (a) says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import webdataset
import yaml
from shard_factory import encode_image, make_image
from test_cli_data import call

from zsr.attacks.autoattack import AutoAttackConfig
from zsr.attacks.pgd import PGDConfig
from zsr.data import suite
from zsr.data.storage import embedded_sets
from zsr.data.suite import dataset_keys, load_card, load_suite, suite_names
from zsr.data.suite.names import clean, duplicates, names_from

FOLDER = Path(suite.__file__).parent
PLAIN = "cifar10 cifar100 stl10 sun397 imagenet tiny_imagenet caltech101".split()
WHOLE = {"caltech101", "caltech256", "eurosat", "sun397"}  # METHODS.md a.2: no split
TGA = set(PLAIN) | {
    "food101", "oxford_pets", "flowers102", "dtd", "eurosat", "fgvc_aircraft", "caltech256", "stanford_cars", "pcam"
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSR_CACHE", str(tmp_path / "cache"))


def test_every_file_is_read_and_every_set_is_there():
    assert len(list(FOLDER.rglob("*.yaml"))) == len(dataset_keys()) + len(suite_names())
    wanted = TGA | set("imagenet_v2 imagenet_r imagenet_a imagenet_sketch country211".split())
    assert len(wanted) == 21
    assert wanted <= set(dataset_keys())
    for key in dataset_keys():
        assert load_card(key).key == key
    for name in suite_names():
        assert load_suite(name).protocol.key == name
    used = {dataset.key for name in suite_names() for dataset in load_suite(name).datasets}
    assert used == set(dataset_keys())
    addresses = {split.address for key in dataset_keys() for split in load_card(key).splits.values() if split.address}
    assert addresses == {address for address in embedded_sets() if "/test_" in address}


@pytest.mark.parametrize("kind", ["datasets", "protocols"])
def test_a_key_that_no_file_has_is_refused(tmp_path, kind):
    path = next((FOLDER / kind).glob("*.yaml"))
    kind_of = suite.DatasetCard if kind == "datasets" else suite.Protocol
    with pytest.raises(ValueError, match="colour"):
        kind_of.model_validate(yaml.safe_load(path.read_text()) | {"colour": "red"})


def test_protocols_are_those_of_the_papers():
    """METHODS.md a.1: how the lists differ from each other."""
    keys = {name: [dataset.key for dataset in load_suite(name).datasets] for name in suite_names()}
    counts = {"tecoa16": 16, "tga16": 16, "ttc16": 16, "fare13": 13}
    assert {name: len(set(keys[name])) for name in counts} == counts
    assert set(keys["tga16"]) == TGA
    assert set(keys["ttc16"]) == TGA - {"tiny_imagenet"} | {"country211"}
    assert set(keys["tecoa16"]) == set(keys["ttc16"])  # the code's seventeen without HatefulMemes
    assert set(keys["fare13"]) == {
        "cifar10", "cifar100", "stl10", "stanford_cars", "caltech101_vtab", "oxford_pets", "flowers102", "dtd", "eurosat",
        "fgvc_aircraft", "pcam", "imagenet_r", "imagenet_sketch",
    }  # fmt: skip
    for name in ("tecoa16", "tga16", "ttc16"):
        splits = load_suite(name).protocol.datasets
        assert {key for key, split in splits.items() if split == "all"} == WHOLE
        assert {key for key, split in splits.items() if split == "val"} == {"imagenet", "tiny_imagenet"} & set(splits)
    resolutions = {name: load_suite(name).protocol.attack_resolution for name in counts}
    assert resolutions == {"tecoa16": "native", "tga16": "224", "ttc16": "224", "fare13": "native"}
    assert all(dataset.expected.published_as for dataset in load_suite("zsr").datasets)


def test_templates_are_those_of_the_papers():
    """METHODS.md a.3."""
    table = dict.fromkeys(PLAIN, "This is a photo of a {}") | {
        "caltech256": "A photo of a {}.",
        "stanford_cars": "A photo of a {}.",
        "oxford_pets": "A photo of a {}, a type of pet.",
        "flowers102": "A photo of a {}, a type of flower.",
        "fgvc_aircraft": "A photo of a {}, a type of aircraft.",
        "food101": "A photo of {}, a type of food.",
        "dtd": "A surface with a {} texture.",
        "eurosat": "A centered satellite photo of {}.",
        "country211": "A photo I took in {}.",
        "pcam": "{}",
    }
    for name in ("tecoa16", "tga16", "ttc16"):
        for dataset in load_suite(name).datasets:
            stop = "." if name == "ttc16" and dataset.key in PLAIN else ""
            assert dataset.templates() == [table[dataset.key] + stop]
    pcam = {dataset.key: dataset for dataset in load_suite("tga16").datasets}["pcam"]
    assert [pcam.templates()[0].format(name) for name in pcam.classes()] == [
        "Tthis is a photo of healthy lymph node tissue.",
        "This is a photo of lymph node tumor tissue.",
    ]


def test_names_that_packages_ship():
    names = names_from("open_clip:imagenet")
    assert len(names) == len(names_from("timm:imagenet")) == 1000
    for variant in "ar":
        subset = names_from(f"open_clip:imagenet-{variant}")
        rest = iter(names)
        assert len(subset) == 200
        assert all(name in rest for name in subset)  # in ImageNet's order
    # The same species by different name lists: the two agree on what label stands for what.
    lemmas = names_from("timm:imagenet")
    assert [(lemmas[label], names[label]) for label in (0, 1, 134, 517)] == [
        ("tench", "tench"), ("goldfish", "goldfish"), ("crane", "crane bird"), ("crane", "construction crane")
    ]  # fmt: skip


def test_shared_names_are_noted():
    """METHODS.md b.13: two classes with one name have one prompt. Those noted are those that there are."""
    checked = 0
    for name in suite_names():
        for dataset in load_suite(name).datasets:
            if "from_set" in (dataset.wording.classes or dataset.card.classes):
                continue
            assert duplicates(dataset.classes()) == dataset.wording.duplicates, (name, dataset.key)
            checked += 1
    assert checked > 10
    assert {"crane", "maillot"} <= set(load_card("imagenet").prompts["tecoa"].duplicates)


@pytest.mark.parametrize(
    ("name", "rules", "cleaned"),
    [
        ("Maple_Tree/old-one", ["lower", "spaces"], "maple tree old one"),
        ("AM General Hummer SUV 2000", ["drop_year"], "AM General Hummer SUV"),
        ("Fiat 500 Abarth", ["drop_year"], "Fiat 500 Abarth"),
        ("737-200", ["boeing"], "Boeing 737-200"),
        ("A300B4", ["boeing"], "A300B4"),
    ],
)
def test_names_are_cleaned(name, rules, cleaned):
    assert clean(name, rules) == cleaned


def test_averages_leave_out_what_says_nothing():
    tga = load_suite("tga16")
    everything = [dataset.key for dataset in tga.datasets]
    averages = tga.averages()
    assert averages["all"] == everything
    assert averages["without_chance_level"] == [key for key in everything if key not in ("pcam", "eurosat")]
    assert averages["without_training_set"] == [key for key in everything if key != "tiny_imagenet"]
    assert len(averages["without_both"]) == 13
    assert tga.averages({"imagenet"})["without_training_set"] == [k for k in everything if k != "imagenet"]
    assert load_suite("zsr").averages()["without_training_set"] == load_suite("zsr").averages()["all"]


def test_attacks_are_in_the_words_of_the_attacks():
    pgd, cascade = set(PGDConfig.model_fields), set(AutoAttackConfig.model_fields)
    fields = {"pgd": pgd, "cw": pgd | {"confidence"}, "autoattack": cascade}
    for name in suite_names():
        for attack in load_suite(name).protocol.attacks:
            assert set(attack.settings) | set(attack.unknown) <= fields[attack.name]
            assert not set(attack.settings) & set(attack.unknown)
            if attack.name == "autoattack" and attack.eps != "unknown" and not attack.unknown:
                for eps in attack.eps:
                    AutoAttackConfig(eps=eps, **attack.settings)


def test_embedded_sets_need_no_folder():
    for dataset in load_suite("embedded").datasets:
        shards = dataset.shards("/nowhere")
        assert dataset.differences(shards.index) == []
        assert dataset.classes(shards) == shards.classes
        assert dataset.templates(shards) == shards.templates


def write_published(root: Path, classes: list[str]) -> Path:
    """CIFAR-10 as CLIP_benchmark publishes it, with twelve images."""
    split = root / "wds_vtab-cifar10" / "test"
    split.mkdir(parents=True)
    (split.parent / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    (split.parent / "zeroshot_classification_templates.txt").write_text("a blurry photo of a {c}.\n")
    with webdataset.TarWriter(str(split / "0.tar"), encoder=False) as tar:
        for number in range(12):
            image = encode_image(make_image(number, 32, 32), "webp")
            tar.write({"__key__": f"s{number:07d}", "webp": image, "cls": str(number % len(classes)).encode()})
    return split


def cifar10(name: str) -> suite.Dataset:
    return {dataset.key: dataset for dataset in load_suite(name).datasets}["cifar10"]


def test_a_published_set_is_found_and_worded_by_the_protocol(tmp_path, caplog):
    names = load_card("cifar10").classes
    split = write_published(tmp_path, list(names))
    with caplog.at_level(logging.WARNING, logger="zsr"):
        shards = cifar10("tga16").shards(str(tmp_path))
    assert "cifar10 (test) has 12 samples, 10000 are expected" in caplog.text
    assert (shards.address, len(shards)) == (str(split), 12)
    assert cifar10("tga16").templates(shards) == ["This is a photo of a {}"]
    assert cifar10("fare13").templates(shards) == ["a blurry photo of a {}."]
    assert cifar10("fare13").classes(shards) == names
    with pytest.raises(ValueError, match="the templates of cifar10 come from the set itself"):
        cifar10("fare13").templates()

    (split.parent / "classnames.txt").write_text("".join(f"{name}\n" for name in sorted(names, reverse=True)))
    with pytest.raises(
        ValueError, match="in another order than those of CIFAR-10: 0 is 'truck' there and 'airplane' here"
    ):
        cifar10("tga16").shards(str(tmp_path))
    (split.parent / "classnames.txt").write_text("".join(f"{name}\n" for name in [*names, "kite"]))
    with pytest.raises(ValueError, match="has 11 classes, but CIFAR-10 has 10"):
        cifar10("tga16").shards(str(tmp_path))


def test_a_missing_set_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError) as caught:
        cifar10("zsr").shards(str(tmp_path))
    for part in ("clip-benchmark/wds_vtab-cifar10", "test/*.tar", f"zsr data convert FOLDER {tmp_path}/cifar10/test"):
        assert part in str(caught.value)
    whole = {dataset.key: dataset for dataset in load_suite("tga16").datasets}["caltech256"]
    assert "hf download" not in whole.how_to_get(str(tmp_path))  # nobody publishes it in this layout


def test_unknown_names_and_bad_files_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="tga61 is not a known suite; did you mean 'tga16'"):
        load_suite("tga61")
    path, tree = tmp_path / "own.yaml", yaml.safe_load((FOLDER / "protocols" / "zsr.yaml").read_text())
    path.write_text(yaml.safe_dump(tree | {"key": "own"}))
    assert len(load_suite(str(path)).datasets) == len(load_suite("zsr").datasets)
    for change, sentence in (
        ({"prompts": ["tecoa"]}, "imagenet_v2 is worded for own, and not for tecoa of zsr"),
        ({"averages": {"all": ["mnist"]}}, r"own\.yaml is not usable: .*leaves out mnist, which the protocol has not"),
        ({"datasets": {"imagenet": "test"}}, r"measures on imagenet \(test\), which has val"),
        ({"datasets": {"mnist": "test"}}, "mnist is not a known test set"),
    ):
        path.write_text(yaml.safe_dump(tree | change, sort_keys=False))
        with pytest.raises(ValueError, match=sentence):
            load_suite(str(path))


def test_the_command_lists_what_is_there(tmp_path, capsys):
    write_published(tmp_path, list(load_card("cifar10").classes))
    assert call("data", "suite") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*suite_names(), *dataset_keys()))

    assert call("data", "suite", "fare13", "--root", tmp_path) == 0
    said = capsys.readouterr().out
    assert said.count("missing") == 12
    assert "1 tars in" in said
    assert "autoattack" in said

    assert call("data", "suite", "fare13", "--root", tmp_path, "--count") == 0
    assert "has 12 samples, 10000" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert call("data", "suite", "embedded") == 0
    assert capsys.readouterr().out.count("as expected in zsr:emoji/") == 3
