"""LAAT's expansion of class embeddings, against the published way with rotation matrices.

The reference rotates the mean onto an axis, scales polar angles and rotates back, in plain Python lists and ``math``.
C classes, D embedding width.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from formula import Matrix, Vector, assert_close, dot, random_rows, slopes, unit_rows
from tiny_clip import tiny_clip, write_tiny_clip
from torch import Tensor

from zsr.config import load_config
from zsr.engine.step import TrainStep
from zsr.models import RobustCLIP, TextBank, class_embeddings, load_model
from zsr.models.anchors import expand, fit_expansion

torch.set_num_threads(1)

C, D = 6, 5
CLASSES, NEW_CLASSES = ["cat", "dog", "boat", "tree", "red car"], ["moon", "cup of tea", "violin"]
TEMPLATE = "a photo of a {}."


def cone(num: int, width: float, seed: int) -> Matrix:
    """Unit embeddings in a cone around one direction, as CLIP's class embeddings are."""
    return [normalized([2.0 + width * row[0], *(width * x for x in row[1:])]) for row in unit_rows(num, D, seed)]


def normalized(a: Vector) -> Vector:
    length = math.sqrt(dot(a, a))
    return [x / length for x in a]


def fitted(text: Matrix) -> tuple[Vector, float]:
    """The normalised mean and the widest angle to it."""
    mu = normalized([math.fsum(column) for column in zip(*text, strict=True)])
    return mu, max(angle_between(a, mu) for a in text)


def angle_between(a: Vector, b: Vector) -> float:
    return math.acos(dot(normalized(a), normalized(b)))


def rotation_onto_first_axis(mu: Vector) -> Matrix:
    """Orthogonal matrix that takes mu to (1, 0, ..., 0): plane rotations, one for each further component."""
    width = len(mu)
    rotation = [[float(i == j) for j in range(width)] for i in range(width)]
    for k in range(1, width):
        first, second = dot(rotation[0], mu), dot(rotation[k], mu)
        length = math.hypot(first, second)
        cosine, sine = first / length, second / length
        row_0, row_k = rotation[0], rotation[k]
        rotation[0] = [cosine * x + sine * y for x, y in zip(row_0, row_k, strict=True)]
        rotation[k] = [-sine * x + cosine * y for x, y in zip(row_0, row_k, strict=True)]
    return rotation


def rotated_expansion(a: Vector, mu: Vector, widest: float) -> Vector:
    """The published form of the expansion of one class embedding."""
    rotation = rotation_onto_first_axis(mu)
    polar, *azimuth = (dot(row, normalized(a)) for row in rotation)
    stretched = math.acos(polar) * (math.pi / 2) / widest
    turned = [math.cos(stretched), *(math.sin(stretched) * x for x in normalized(azimuth))]
    return [dot(column, turned) for column in zip(*rotation, strict=True)]


def as_tensor(rows: list[Vector] | Vector | float) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_reference_rotates():
    mu = unit_rows(1, D, 3)[0]
    rotation = rotation_onto_first_axis(mu)
    assert_close([dot(row, mu) for row in rotation], [1.0] + [0.0] * (D - 1))
    assert_close([[dot(a, b) for b in rotation] for a in rotation], torch.eye(D).tolist())


def test_the_mean_and_the_widest_angle_are_those_of_the_training_classes():
    text = cone(C, 0.8, seed=0)
    mean_D, angle = fit_expansion(as_tensor(text))
    mu, widest = fitted(text)
    assert_close(mean_D.tolist(), mu)
    assert angle.item() == pytest.approx(widest, abs=1e-9)


def test_training_classes_expand_as_with_rotation_matrices_and_the_widest_reaches_a_right_angle():
    text = cone(C, 0.8, seed=0)
    mean_D, angle = fit_expansion(as_tensor(text))
    mu, widest = fitted(text)
    expanded = expand(as_tensor(text), mean_D, angle).tolist()
    assert_close(expanded, [rotated_expansion(a, mu, widest) for a in text])
    assert max(angle_between(a, mu) for a in expanded) == pytest.approx(math.pi / 2, abs=1e-9)


def test_new_classes_keep_the_fit_and_may_pass_the_right_angle():
    mu, widest = fitted(cone(C, 0.8, seed=0))
    new = [*cone(4, 0.5, seed=1), *cone(4, 1.9, seed=2)]
    angles = [angle_between(a, mu) for a in new]
    assert min(angles) < widest < max(angles)  # some inside the training classes' cone, some beyond
    expanded = expand(as_tensor(new), as_tensor(mu), as_tensor(widest)).tolist()
    assert_close(expanded, [rotated_expansion(a, mu, widest) for a in new])
    for a, before in zip(expanded, angles, strict=True):
        assert (dot(a, mu) < 0) == (before > widest)
        assert dot(a, a) == pytest.approx(1, abs=1e-12)


def test_the_gradient_is_that_of_the_rotation_form():
    mu, widest = fitted(cone(C, 0.8, seed=0))
    text, weight = cone(4, 1.4, seed=2), random_rows(4, D, seed=3)
    leaf = as_tensor(text).requires_grad_()
    (expand(leaf, as_tensor(mu), as_tensor(widest)) * as_tensor(weight)).sum().backward()

    def total(rows: Matrix) -> float:
        return math.fsum(dot(w, rotated_expansion(a, mu, widest)) for a, w in zip(rows, weight, strict=True))

    assert leaf.grad is not None
    assert_close(leaf.grad.tolist(), slopes(total, text), 1e-9)


def test_a_class_on_the_mean_stays_there_and_its_gradient_stretches_as_its_neighbours():
    mu, widest = fitted(cone(C, 0.8, seed=0))
    leaf = as_tensor([mu]).requires_grad_()
    expanded = expand(leaf, as_tensor(mu), as_tensor(widest))
    assert_close(expanded[0].tolist(), mu, 1e-12)
    weight = random_rows(D, seed=4)
    (expanded[0] * as_tensor(weight)).sum().backward()
    # Near the mean the map stretches what is across it by (pi/2) / theta_max, and nothing along it.
    across = [w - dot(weight, mu) * m for w, m in zip(weight, mu, strict=True)]
    assert leaf.grad is not None
    assert_close(leaf.grad[0].tolist(), [math.pi / 2 / widest * x for x in across])


def test_single_precision_is_enough():
    text = cone(C, 0.3, seed=5)
    mean_D, angle = fit_expansion(as_tensor(text).float())
    mu, widest = fitted(text)
    found = expand(as_tensor(text).float(), mean_D, angle)
    assert found.dtype == torch.float32
    assert_close(found.tolist(), [rotated_expansion(a, mu, widest) for a in text], 2e-5)


@pytest.mark.parametrize("text", [[[0.6, 0.8]], [[0.6, 0.8]] * 3], ids=["one class", "equal prompts"])
def test_classes_with_one_embedding_cannot_be_spread_out(text):
    with pytest.raises(ValueError, match=r"expand_text.*two different classes"):
        fit_expansion(as_tensor(text))


def test_templates_are_averaged_as_unit_embeddings():
    features, projection = random_rows(3, 2, 4, seed=6), random_rows(4, D, seed=7)
    expected = []
    for prompts in features:
        embedded = [normalized([dot(e, column) for column in zip(*projection, strict=True)]) for e in prompts]
        expected.append(normalized([math.fsum(x) for x in zip(*embedded, strict=True)]))
    assert_close(class_embeddings(as_tensor(features), as_tensor(projection)).tolist(), expected)


# In a run.


def make_step(folder: Path, *overrides: str) -> tuple[RobustCLIP, TrainStep]:
    config = load_config("default", [f"model.name={write_tiny_clip(folder)}", *overrides])
    model = load_model(config.model, "fp32")
    return model, TrainStep(config, model, TextBank(model), CLASSES, [TEMPLATE])


def plain_embeddings(folder: Path, class_names: list[str]) -> Matrix:
    """Of the same model without expansion."""
    model = tiny_clip(folder)
    embeddings: Matrix = model.class_embeddings(TextBank(model).features(class_names, [TEMPLATE])).double().tolist()
    return embeddings


@pytest.mark.parametrize("overrides", [["objective.name=laat"], ["objective.name=tecoa", "model.expand_text=true"]])
def test_a_run_trains_on_expanded_text_and_its_checkpoint_expands_new_classes(tmp_path, overrides):
    mu, widest = fitted(plain_embeddings(tmp_path, CLASSES))
    model, step = make_step(tmp_path, *overrides)
    expected = [rotated_expansion(a, mu, widest) for a in plain_embeddings(tmp_path, CLASSES)]
    assert_close(step.text0_CD.tolist(), expected, 1e-4)
    loaded = tiny_clip(tmp_path)
    loaded.load_trained_state(model.trained_state())
    found = loaded.class_embeddings(TextBank(loaded).features(NEW_CLASSES, [TEMPLATE])).tolist()
    assert_close(found, [rotated_expansion(a, mu, widest) for a in plain_embeddings(tmp_path, NEW_CLASSES)], 1e-4)


def test_without_expansion_text_is_clips_own(tmp_path):
    _, step = make_step(tmp_path, "objective.name=laat", "objective.expand=false")
    assert_close(step.text0_CD.tolist(), plain_embeddings(tmp_path, CLASSES), 1e-6)
