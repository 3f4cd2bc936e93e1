"""Heads that an attacker sees in place of the judging one, and the superclasses that test sets name.

Shapes: B images, C classes, D embedding width, H x W pixels.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import yaml
from pydantic import ValidationError
from tiny_clip import tiny_clip

from zsr.attacks.base import input_gradients_only
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.data.shards import ShardSet
from zsr.data.suite import DatasetCard, load_card, match_superclasses, read_superclasses
from zsr.data.suite.registry import _FOLDER
from zsr.eval.crafted import craft_head
from zsr.models import TextBank

torch.set_num_threads(1)

CLASSES = ["Shark", "maple tree", "ray", "oak_tree"]
FOUND = {"shark": "fish", "ray": "fish", "maple_tree": "trees", "oak-tree": "trees"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("tiny"), seed=0).eval()


@pytest.fixture(scope="module")
def bank(clip):
    return TextBank(clip)


def embedding(clip, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        feature_D = clip.open_clip.encode_text(clip.tokenizer([prompt]))[0]
    return feature_D / feature_D.norm()


def test_superclasses_make_the_attackers_head_and_the_labels_in_it(clip, bank):
    head, label_of_C = craft_head(clip, bank, CLASSES, templates=["a {} here"], superclasses=FOUND)
    assert label_of_C.tolist() == [0, 1, 0, 1]
    expected = torch.stack([embedding(clip, "a fish here"), embedding(clip, "a trees here")])
    assert torch.allclose(head.text_CD, expected, atol=1e-5)
    default, _ = craft_head(clip, bank, CLASSES, superclasses=FOUND)
    assert torch.allclose(default.text_CD[0], embedding(clip, "This is a photo of a fish."), atol=1e-5)


def test_other_templates_change_the_head_and_not_the_labels(clip, bank):
    head, label_of_C = craft_head(clip, bank, CLASSES, templates=["one {}"])
    assert label_of_C is None
    assert torch.allclose(head.text_CD[3], embedding(clip, "one oak_tree"), atol=1e-5)


def test_an_attack_on_the_crafted_head_raises_the_superclass_loss(clip, bank):
    head, label_of_C = craft_head(clip, bank, CLASSES, superclasses=FOUND)
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    label = label_of_C[torch.arange(4)]
    with input_gradients_only(clip.image):
        found = PGD(PGDConfig(eps="8/255", step_size="2/255", steps=4)).attack_classifier(head, image, label, range(4))
    with torch.no_grad():
        before, after = (head(x).softmax(1).gather(1, label[:, None]) for x in (image, found.image_BCHW))
    assert (after < before).all()


def test_what_cannot_be_crafted_is_said(clip, bank):
    with pytest.raises(ValueError, match=r"the class 'ray' has no superclass; name one"):
        craft_head(clip, bank, CLASSES, superclasses={key: value for key, value in FOUND.items() if key != "ray"})
    with pytest.raises(ValueError, match=r"the class 'Shark' has no superclass \(3 others have none either\)"):
        match_superclasses(CLASSES, {})
    with pytest.raises(ValueError, match="all classes belong to the superclass 'fish'"):
        craft_head(clip, bank, CLASSES, superclasses=dict.fromkeys(FOUND, "fish"))
    with pytest.raises(ValueError, match="needs templates or superclasses"):
        craft_head(clip, bank, CLASSES)


def test_cifar100_has_its_twenty_and_the_emoji_their_groups():
    found = read_superclasses("cifar100")
    card = load_card("cifar100")
    assert sorted(found) == sorted(card.classes)
    assert set(Counter(found.values()).values()) == {5} and len(set(found.values())) == 20
    assert found["ray"] == "fish" and found["tank"] == "vehicles 2" and found["whale"] == "aquatic mammals"
    for key in ("emoji_test_style", "emoji_test_concepts", "emoji_test_both"):
        classes = ShardSet(load_card(key).splits["test"].address).classes
        groups = match_superclasses(classes, read_superclasses(key))
        assert len(set(groups)) == 8 and "food and drink" in groups
    assert read_superclasses("emoji_test_style")["pineapple"] == "food and drink"


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("fish: [shark, ray]\ntrees: [oak]\n")
    assert read_superclasses(str(path)) == {"shark": "fish", "ray": "fish", "oak": "trees"}
    path.write_text("fish: [shark, ray]\ntrees: [ray]\n")
    with pytest.raises(ValueError, match=r"mine.yaml: the class 'ray' is in 'fish' and in 'trees'"):
        read_superclasses(str(path))
    for text in ("", "shark: fish", "- fish", "fish: [1, 2]", "fish: [shark"):
        path.write_text(text)
        with pytest.raises(ValueError, match="should have one line for each superclass"):
            read_superclasses(str(path))
    with pytest.raises(ValueError, match=r"there is no file .*other.yaml"):
        read_superclasses(str(tmp_path / "other.yaml"))
    with pytest.raises(ValueError, match=r"cifar10 has no superclasses; cifar100, .* have"):
        read_superclasses("cifar10")
    with pytest.raises(ValueError, match="is not a known test set"):
        read_superclasses("cifar1000")


def test_a_set_whose_superclasses_leave_out_a_class_is_refused():
    tree = yaml.safe_load((_FOLDER / "datasets" / "cifar100.yaml").read_text())
    tree["superclasses"]["fish"].remove("ray")
    with pytest.raises(ValidationError, match="superclasses should have each of the classes once"):
        DatasetCard.model_validate(tree)
