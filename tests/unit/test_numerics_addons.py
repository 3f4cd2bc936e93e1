"""AdvCL, RegMix and GSB against their formulas, written again from METHODS.md section 9 in plain float64 loops.

B images, C classes, D embedding width, H x W pixels.
"""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from formula import Bench, Case, Matrix, Vector, assert_close, assert_zero, dot, random_rows, slopes, softmax, unit_rows

from zsr.config.schema import OBJECTIVES

torch.set_num_threads(1)

B, C, D = 4, 5, 3
SCALE = 7.5
LABEL = [0, 2, 4, 3]
TWINS = frozenset({(2, 4), (4, 2)})
VIEWS = ("adv", "clean", "clean_fixed", "extra", "start", "frozen_clean")
TRAINED = ("adv", "clean", "extra")


def make_case() -> Case:
    case: Case = {view: unit_rows(B, D, seed) for seed, view in enumerate(VIEWS)}
    case |= {"text": unit_rows(C, D, 11), "text0": unit_rows(C, D, 12)}
    for key in ("text", "text0"):
        case[key][4] = list(case[key][2])
    return case


def bench(name: str, settings: dict[str, object], case: Case, progress: float = 0.0) -> Bench:
    made = Bench(name, settings, case, LABEL, scale=SCALE, twins=TWINS, progress=progress)
    if "clean_fixed" in made.leaves:
        made.leaves["clean_fixed"].requires_grad_(False)  # the engine makes it without a graph
    return made


def logits(v: Vector, text: Matrix) -> Vector:
    return [SCALE * dot(v, t) for t in text]


def cross_entropies(images: Matrix, text: Matrix, label: list[int]) -> Vector:
    return [-math.log(softmax(logits(v, text))[y]) for v, y in zip(images, label, strict=True)]


def mean(values: Vector) -> float:
    return math.fsum(values) / len(values)


def divergence(first: Matrix, second: Matrix, text: Matrix, tau: float = 1.0) -> float:
    """Mean over images of tau^2 KL(softmax(s <first, t> / tau) || softmax(s <second, t> / tau))."""
    total = 0.0
    for a, b in zip(first, second, strict=True):
        p, q = (softmax([z / tau for z in logits(v, text)]) for v in (a, b))
        total += math.fsum(p_c * math.log(p_c / q_c) for p_c, q_c in zip(p, q, strict=True))
    return tau**2 * total / len(first)


def check(
    name: str,
    settings: dict[str, object],
    weights: dict[str, float],
    formulas,
    trained: set[str],
    progress: float = 0.0,
) -> None:
    """Every term with a weight, the total, and the gradient of every trained leaf; no gradient elsewhere."""
    case = make_case()
    total, terms, gradients = bench(name, settings, case, progress).loss()
    expected = formulas(case)
    assert set(terms) == {"ce"} | {term for term, weight in weights.items() if weight}
    for term, value in terms.items():
        assert value == pytest.approx(expected[term], abs=1e-9)

    def loss(moved: Case) -> float:
        values = formulas({**case, **moved})
        return math.fsum(weights[term] * values[term] for term in weights if weights[term])

    assert total == pytest.approx(loss({}), abs=1e-9)
    for leaf, gradient in gradients.items():
        if leaf in trained:
            assert_close(gradient, slopes(lambda rows, leaf=leaf: loss({leaf: rows}), case[leaf]))
        else:
            assert_zero(gradient)


def check_is_tecoa(name: str, options: dict[str, object]) -> None:
    reduced = OBJECTIVES.build(OBJECTIVES.config_class(name)()).tecoa_settings
    assert reduced is not None
    found, tecoa = bench(name, reduced | options, make_case(), progress=0.3), bench("tecoa", {}, make_case())
    assert found.objective.views == {"adv"} and not found.objective.attack_views
    total, terms, gradients = found.loss()
    tecoa_total, _, tecoa_gradients = tecoa.loss()
    assert (total, gradients, set(terms)) == (tecoa_total, tecoa_gradients, {"ce"})
    attacks = [bench(*of, make_case()).attack_loss() for of in ((name, reduced | options), ("tecoa", {}))]
    assert attacks[0] == attacks[1]


# RegMix.


@pytest.mark.parametrize("clean_target", ["frozen", "live", "trained"])
@pytest.mark.parametrize("off", [None, "main", "auxiliary", "clean"])
def test_regmix_equals_its_formula(clean_target, off):
    weights = {"ce": 1.0, "main": 0.9, "auxiliary": 0.4, "clean": 1.3}
    if off:
        weights[off] = 0.0
    view = {"frozen": "frozen_clean", "live": "clean_fixed", "trained": "clean"}[clean_target]

    def formulas(case: Case) -> dict[str, float]:
        text = case["text"]
        return {
            "ce": mean(cross_entropies(case["adv"], text, LABEL)),
            "main": divergence(case["start"], case["adv"], text),
            "auxiliary": divergence(case["adv"], case["start"], text),
            "clean": divergence(case[view], case["adv"], text),
        }

    settings = {f"weight_{term}": weight for term, weight in weights.items() if term != "ce"}
    trained = {"adv", "clean"} if view == "clean" and off != "clean" else {"adv"}
    check("regmix", {**settings, "clean_target": clean_target}, weights, formulas, trained)
    views = OBJECTIVES.build(
        OBJECTIVES.config_class("regmix").model_validate({**settings, "clean_target": clean_target})
    ).views
    assert views == {"adv", "start"} | ({view} if off != "clean" else set())


@pytest.mark.parametrize(("clean_target", "units"), [("frozen", 8), ("live", 8), ("trained", 10)])
def test_regmix_costs_no_more_for_the_starting_point(clean_target, units):
    objective = OBJECTIVES.build(OBJECTIVES.config_class("regmix").model_validate({"clean_target": clean_target}))
    assert "start" in objective.views and objective.cost_units(2) == units


# GSB.


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [
        ("linear", lambda x: x),
        ({"name": "linear", "start": 0.8, "end": 0.2}, lambda x: 0.8 - 0.6 * x),
        ({"name": "cosine"}, lambda x: (1 - math.cos(math.pi * x)) / 2),
        ({"name": "step", "at": [0.25], "factors": [0.1, 0.6]}, lambda x: 0.1 if x < 0.25 else 0.6),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gsb_equals_its_formula_as_training_goes_on(progress, schedule, ratio, temperature):
    case, weight, r = make_case(), 0.7, ratio(progress)

    def formulas(adv: Matrix) -> dict[str, float]:
        text = case["text"]
        return {
            "ce": mean(cross_entropies(adv, text, LABEL)),
            "kd": divergence(case["frozen_clean"], adv, text, temperature),
        }

    def loss(adv: Matrix) -> float:
        terms = formulas(adv)
        return (1 - r) * weight * terms["kd"] + r * terms["ce"]

    settings = {"weight_kd": weight, "schedule": schedule, "temperature": temperature}
    made = bench("gsb", settings, case, progress)
    assert made.objective.views == {"adv", "frozen_clean"}
    total, terms, gradients = made.loss()
    assert terms == pytest.approx(formulas(case["adv"]), abs=1e-9)
    assert total == pytest.approx(loss(case["adv"]), abs=1e-9)
    assert_close(gradients.pop("adv"), slopes(loss, case["adv"]))
    assert_zero(list(gradients.values()))


def test_gsb_refuses_a_distillation_that_never_counts():
    with pytest.raises(ValueError, match=r"weight_kd=0\.5 never counts with schedule=constant, .* set weight_kd=0"):
        OBJECTIVES.config_class("gsb").model_validate({"weight_kd": 0.5, "schedule": "constant"})


def test_gsbs_schedule_is_set_as_any_plug_in_is():
    from zsr.config import load_config

    config = load_config("default", ["objective.name=gsb", "objective.schedule.end=0.4"])
    assert config.objective.schedule.model_dump() == {"name": "linear", "start": 0.0, "end": 0.4}
    other = load_config("default", ["objective.name=gsb", "objective.schedule=cosine"])
    assert other.objective.schedule.name == "cosine"
    assert type(config).model_validate(config.model_dump()) == config


# AdvCL.


def contrasts(views: list[Matrix], text: Matrix, tau: float, negatives: str) -> Vector:
    """L_con of each sample."""
    losses = []
    for i, y in enumerate(LABEL):
        others = [c for c in range(C) if c != y and (y, c) not in TWINS]
        pairs = []
        for a in range(len(views)):
            for b in range(len(views)):
                if a == b:
                    continue
                positive = math.exp(dot(views[a][i], views[b][i]) / tau)
                against = math.fsum(math.exp(dot(views[a][i], text[c]) / tau) for c in others)
                pairs.append(-math.log(positive / (positive + against) if negatives == "classes" else positive))
        losses.append(mean(pairs))
    return losses


def pseudo_labels(case: Case) -> list[int]:
    found = []
    for v in case["frozen_clean"]:
        cosines = [dot(v, t) for t in case["text0"]]
        found.append(cosines.index(max(cosines)))
    return found


@pytest.mark.parametrize("negatives", ["classes", "none"])
@pytest.mark.parametrize("high_frequency", ["offset", "off"])
@pytest.mark.parametrize(("off", "tau"), [(None, 0.5), (None, 1.7), ("contrast", 0.5), ("pseudo", 0.5)])
def test_advcl_equals_its_formula(negatives, high_frequency, off, tau):
    weights = {"ce": 1.0, "contrast": 0.6, "pseudo": 0.3}
    if off:
        weights[off] = 0.0
    seen = {"adv", "clean"} | ({"extra"} if high_frequency != "off" else set())

    def formulas(case: Case) -> dict[str, float]:
        views = [case[view] for view in TRAINED if view in seen]
        return {
            "ce": mean(cross_entropies(case["adv"], case["text"], LABEL)),
            "contrast": mean(contrasts(views, case["text"], tau, negatives)),
            "pseudo": mean(cross_entropies(case["adv"], case["text"], pseudo_labels(case))),
        }

    settings = {
        "weight_contrast": weights["contrast"],
        "weight_pseudo": weights["pseudo"],
        "temperature": tau,
        "negatives": negatives,
        "high_frequency": high_frequency,
    }
    trained = seen if weights["contrast"] else {"adv"}
    assert sum(a != b for a, b in zip(pseudo_labels(make_case()), LABEL, strict=True)) > 1
    frozen = {"frozen_clean"} if weights["pseudo"] else set()
    assert bench("advcl", settings, make_case()).objective.views == trained | frozen
    check("advcl", settings, weights, formulas, trained)


@pytest.mark.parametrize("negatives", ["classes", "none"])
@pytest.mark.parametrize("attack", ["joint", "ce"])
def test_advcls_attack_sees_one_sample_at_a_time_and_moves_the_attacked_view_alone(negatives, attack):
    case, weights = make_case(), {"weight_contrast": 0.6, "weight_pseudo": 0.3}

    def formula(adv: Matrix) -> Vector:
        loss = cross_entropies(adv, case["text"], LABEL)
        if attack == "ce":
            return loss
        contrast = contrasts([adv, case["clean"]], case["text"], 0.5, negatives)
        pseudo = cross_entropies(adv, case["text"], pseudo_labels(case))
        return [a + 0.6 * b + 0.3 * c for a, b, c in zip(loss, contrast, pseudo, strict=True)]

    made = bench("advcl", {**weights, "negatives": negatives, "attack": attack}, case)
    assert made.objective.attack_views == ({"clean"} if attack == "joint" else set())
    loss, gradients = made.attack_loss()
    assert_close(loss, formula(case["adv"]))
    assert_close(gradients.pop("adv"), slopes(lambda rows: math.fsum(formula(rows)), case["adv"]))
    assert_zero(list(gradients.values()))


@pytest.mark.parametrize("labels_left", [1, 2])
def test_advcl_is_finite_where_every_class_is_the_samples_own(labels_left):
    case = {key: rows if key in VIEWS else rows[:labels_left] for key, rows in make_case().items()}
    twins = frozenset({(0, 1), (1, 0)}) if labels_left == 2 else frozenset()
    total, _, gradients = Bench("advcl", {}, case, [0] * B, scale=SCALE, twins=twins).loss()
    assert math.isfinite(total)
    assert all(math.isfinite(x) for rows in gradients.values() for row in rows for x in row)


def high_frequencies(image: Matrix, radius: float) -> Matrix:
    """Discrete Fourier transform, disc removed, and back: sums over every pixel and frequency."""
    height, width = len(image), len(image[0])

    def signed(k: int, size: int) -> int:
        return k - size if k >= (size + 1) // 2 else k

    kept = {}
    for k in range(height):
        for m in range(width):
            if math.hypot(signed(k, height), signed(m, width)) >= radius:
                kept[k, m] = sum(
                    image[y][x] * cmath.exp(-2j * math.pi * (k * y / height + m * x / width))
                    for y in range(height)
                    for x in range(width)
                )
    return [
        [
            sum(v * cmath.exp(2j * math.pi * (k * y / height + m * x / width)) for (k, m), v in kept.items()).real
            / (height * width)
            for x in range(width)
        ]
        for y in range(height)
    ]


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 5)])
@pytest.mark.parametrize("radius", [0.5, 2.0, 2.5])
@pytest.mark.parametrize("form", ["offset", "clip"])
def test_the_high_frequency_image_is_what_the_transform_says(height, width, radius, form):
    image = [
        [[0.5 + 0.5 * math.tanh(x) for x in row] for row in channel]
        for channel in random_rows(3, height, width, seed=1)
    ]
    objective = OBJECTIVES.build(
        OBJECTIVES.config_class("advcl").model_validate({"radius": radius, "high_frequency": form})
    )
    found = objective.extra_image(torch.tensor([image], dtype=torch.float64))[0].tolist()
    offset = 0.5 if form == "offset" else 0.0
    expected = [
        [[min(max(x + offset, 0.0), 1.0) for x in row] for row in high_frequencies(channel, radius)]
        for channel in image
    ]
    assert_close(found, expected)
    assert len({x for channel in found for row in channel for x in row}) > 10


def test_a_radius_that_leaves_nothing_of_the_image_is_refused():
    objective = OBJECTIVES.build(OBJECTIVES.config_class("advcl").model_validate({"radius": 50}))
    with pytest.raises(
        ValueError, match=r"objective\.radius=50: leaves no frequency of 32 x 32 pixels; use less than 23"
    ):
        objective.extra_image(torch.rand(1, 3, 32, 32))


# All three.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("regmix", {}),
        ("regmix", {"clean_target": "trained"}),
        ("gsb", {"temperature": 3.0}),
        ("advcl", {}),
        ("advcl", {"negatives": "none", "high_frequency": "off", "temperature": 2.0}),
    ],
)
def test_without_their_extra_terms_they_are_tecoa_to_the_last_bit(name, options):
    check_is_tecoa(name, options)
