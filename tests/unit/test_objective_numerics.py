"""Objectives against their formulas, written again from the published mathematics in plain float64 loops.

This file: TeCoA, plain fine-tuning and TIMA; the others have files beside it, and tests/formula.py says how. B images, C
classes, D embedding width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from formula import Bench, Matrix, assert_close, dot, slopes, softmax, unit_rows
from torch import Tensor

from zsr.config.schema import OBJECTIVES
from zsr.models import ImageFeatures
from zsr.objectives.base import StepContext
from zsr.objectives.text_spread import adaptive_margin, centred_similarity, hyperspherical_energy, semantic_consistency

torch.set_num_threads(1)

B, C, D = 5, 6, 4
SCALE = 7.5


@dataclass
class Case:
    """Unit embeddings of one step; class 5 has the same prompt as class 2."""

    adv: Matrix
    clean: Matrix
    frozen_clean: Matrix
    frozen_adv: Matrix
    text: Matrix
    text0: Matrix
    label: list[int] = field(default_factory=lambda: [0, 2, 5, 3, 2])
    twins: frozenset[tuple[int, int]] = frozenset({(2, 5), (5, 2)})


def make_case() -> Case:
    case = Case(*(unit_rows(B, D, seed) for seed in range(4)), text=unit_rows(C, D, 5), text0=unit_rows(C, D, 6))
    case.text[5], case.text0[5] = list(case.text[2]), list(case.text0[2])
    return case


def run_objective(
    name: str, settings: dict[str, object], case: Case
) -> tuple[float, dict[str, float], dict[str, Matrix]]:
    """Loss, terms, and gradients with respect to the trained views' embeddings and to the class embeddings."""
    rows = {key: getattr(case, key) for key in ("adv", "clean", "frozen_adv", "frozen_clean", "text", "text0")}
    return Bench(name, settings, rows, case.label, scale=SCALE, twins=case.twins).loss()


# The formulas.


def cross_entropy(images: Matrix, text: Matrix, label: list[int], margin: Callable[[int, int], float]) -> float:
    """Mean of -log [ e^{s<v,t_y>} / (e^{s<v,t_y>} + sum_{j != y} e^{s(<v,t_j> + m_yj)}) ]."""
    losses = []
    for v, y in zip(images, label, strict=True):
        right = math.exp(SCALE * dot(v, text[y]))
        wrong = [math.exp(SCALE * (dot(v, text[j]) + margin(y, j))) for j in range(C) if j != y]
        losses.append(-math.log(right / (right + math.fsum(wrong))))
    return math.fsum(losses) / len(losses)


def distillation(targets: Matrix, target_text: Matrix, images: Matrix, text: Matrix, temperature: float) -> float:
    """Mean over images of tau^2 KL(softmax(s v0 T0 / tau) || softmax(s v T / tau))."""
    total = 0.0
    for v0, v in zip(targets, images, strict=True):
        p = softmax([SCALE * dot(v0, t) / temperature for t in target_text])
        q = softmax([SCALE * dot(v, t) / temperature for t in text])
        total += math.fsum(p_c * (math.log(p_c) - math.log(q_c)) for p_c, q_c in zip(p, q, strict=True))
    return temperature**2 * total / len(images)


def energy(text: Matrix, twins: frozenset[tuple[int, int]], form: str, power: float) -> float:
    """Mean of h(|t_i - t_j|) over ordered pairs of classes whose prompts differ."""
    values = []
    for i in range(C):
        for j in range(C):
            if i == j or (i, j) in twins:
                continue
            r = math.sqrt(2 - 2 * dot(text[i], text[j]))
            if form == "bounded":
                values.append(1 / (1 + r**power))
            else:
                values.append(-math.log(r) if power == 0 else r**-power)
    return math.fsum(values) / len(values)


SHAPES = {"identity": lambda d: d, "sqrt": math.sqrt, "square": lambda d: d * d}


def margin_of(
    case: Case, base: float, scale: float, sign: str, text: Matrix | None = None, shape: str = "identity"
) -> Callable[[int, int], float]:
    """m_yj = m_0 + m_1 phi(d_yj), d rescaled to [0, 1] over the other classes; minus for the other sign."""
    text = text or case.text0

    def margin(y: int, j: int) -> float:
        if (y, j) in case.twins:
            return 0.0  # nothing could tell the two apart
        distances = {k: 1 - dot(text[y], text[k]) for k in range(C) if k != y and (y, k) not in case.twins}
        low, high = min(distances.values()), max(distances.values())
        d = SHAPES[shape]((distances[j] - low) / (high - low))
        return base + scale * d if sign == "distant" else base - scale * d

    return margin


def similarities(text: Matrix, twins: frozenset[tuple[int, int]]) -> list[float]:
    """Cosines of the ordered pairs of classes whose prompts differ."""
    num = len(text)
    return [dot(text[i], text[j]) for i in range(num) for j in range(num) if i != j and (i, j) not in twins]


def consistency(text: Matrix, text0: Matrix, twins: frozenset[tuple[int, int]], form: str) -> float:
    """min over a >= 0, b of mean (y - a x - b)^2, or 1 - corr(x, y), over similarities y now and x before."""
    y, x = similarities(text, twins), similarities(text0, twins)
    num = len(y)
    sum_x, sum_y = math.fsum(x), math.fsum(y)
    sum_xx, sum_xy = (math.fsum(p * q for p, q in zip(x, other, strict=True)) for other in (x, y))
    if form == "correlation":
        sum_yy = math.fsum(q * q for q in y)
        together = num * sum_xy - sum_x * sum_y
        return 1 - together / math.sqrt((num * sum_xx - sum_x**2) * (num * sum_yy - sum_y**2))
    # The normal equations of a line; where its slope falls the best allowed one is flat.
    a = max(0.0, (num * sum_xy - sum_x * sum_y) / (num * sum_xx - sum_x**2))
    b = (sum_y - a * sum_x) / num
    return math.fsum((q - a * p - b) ** 2 for p, q in zip(x, y, strict=True)) / num


def tima_terms(case: Case, *, adv: Matrix, clean: Matrix, text: Matrix, o: dict[str, object]) -> dict[str, float]:
    """All terms. ``text`` stands where it is tuned; image terms and margins see ``case.text``, a constant."""
    distilled = adv if o["takd_view"] == "adv" else clean
    measured = case.text if o.get("margin_text") == "current" else case.text0
    shape = o.get("margin_shape", "identity")
    margin = margin_of(case, o["margin_base"], o["margin_scale"], o["margin_sign"], measured, shape)
    tau = o["temperature"]
    aaai26 = {"sc": consistency(text, case.text0, case.twins, o["sc_form"])} if o.get("variant") == "aaai26" else {}
    return aaai26 | {
        "tam": cross_entropy(adv, case.text, case.label, margin),
        "takd": distillation(case.frozen_clean, case.text, distilled, case.text, tau),
        "mhe": energy(text, case.twins, o["mhe_form"], o["mhe_power"]),
        "iakd": distillation(case.frozen_clean, case.text0, case.frozen_clean, text, tau),
    }


# The comparisons.


def test_tecoa_and_clean_are_cross_entropy_of_their_view():
    case = make_case()
    for name, view in (("tecoa", "adv"), ("clean", "clean")):
        total, terms, gradients = run_objective(name, {}, case)

        def loss(images: Matrix) -> float:
            return cross_entropy(images, case.text, case.label, lambda y, j: 0.0)

        assert total == terms["ce"] == pytest.approx(loss(getattr(case, view)), abs=1e-12)
        assert_close(gradients.pop(view), slopes(loss, getattr(case, view)), 1e-9)
        assert all(value == 0 for rows in gradients.values() for row in rows for value in row)


TIMA_DEFAULTS = {
    "weight_tam": 1.0,
    "weight_takd": 0.7,
    "weight_mhe": 0.4,
    "weight_iakd": 1.3,
    "margin_base": 0.02,
    "margin_scale": 0.15,
    "margin_sign": "distant",
    "mhe_form": "bounded",
    "mhe_power": 2.0,
    "takd_view": "adv",
    "temperature": 1.0,
}
FORMS = [("bounded", 2.0), ("bounded", 1.0), ("riesz", 2.0), ("riesz", 0.0), ("riesz", 1.0)]
TIMA_SETTINGS = [
    {"margin_sign": sign, "mhe_form": form, "mhe_power": power, "takd_view": view, "temperature": temperature}
    for number, (form, power) in enumerate(FORMS)
    for sign, view in itertools.product(("distant", "similar"), ("adv", "clean"))
    for temperature in [(1.0, 2.5)[number % 2]]
] + [
    {"margin_base": 0.0},
    {"margin_scale": 0.0},
    {"weight_tam": 0.0},
    {"weight_takd": 0.0},
    {"weight_mhe": 0.0},
    {"weight_iakd": 0.0},
    {"weight_takd": 0.0, "weight_iakd": 0.0, "takd_view": "clean"},
]


@pytest.mark.parametrize("settings", TIMA_SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_tima_equals_its_formula_in_value_and_gradient(settings):
    case, o = make_case(), TIMA_DEFAULTS | settings
    weights = {name: o[f"weight_{name}"] for name in ("tam", "takd", "mhe", "iakd")}

    def loss(adv: Matrix | None = None, clean: Matrix | None = None, text: Matrix | None = None) -> float:
        terms = tima_terms(case, adv=adv or case.adv, clean=clean or case.clean, text=text or case.text, o=o)
        return math.fsum(weights[name] * terms[name] for name in terms)

    total, terms, gradients = run_objective("tima", o, case)
    expected = tima_terms(case, adv=case.adv, clean=case.clean, text=case.text, o=o)
    for name, value in terms.items():
        assert value == pytest.approx(expected[name], abs=1e-9)
    assert {"tam"} | {name for name, weight in weights.items() if weight} == set(terms)
    assert total == pytest.approx(loss(), abs=1e-9)
    assert_close(gradients["adv"], slopes(lambda rows: loss(adv=rows), case.adv), 1e-9)
    if o["takd_view"] == "clean":
        assert_close(gradients["clean"], slopes(lambda rows: loss(clean=rows), case.clean), 1e-9)
    else:
        assert not any(value for row in gradients["clean"] for value in row)
    assert_close(gradients["text"], slopes(lambda rows: loss(text=rows), case.text), 1e-9)


AAAI26_DEFAULTS = TIMA_DEFAULTS | {
    "variant": "aaai26",
    "weight_sc": 6.0,
    "sc_form": "correlation",
    "margin_text": "current",
    "margin_shape": "identity",
}
AAAI26_SETTINGS = [
    {"sc_form": sc_form, "margin_text": text, "margin_shape": shape, "margin_sign": sign}
    for sc_form, text in itertools.product(("affine", "correlation"), ("current", "original"))
    for shape, sign in (("identity", "distant"), ("sqrt", "similar"), ("square", "distant"))
] + [
    {"weight_sc": 0.0},
    {"weight_mhe": 0.0},
    {"weight_iakd": 0.0, "temperature": 2.0},
    {"weight_takd": 0.0},
    {"mhe_form": "riesz", "takd_view": "clean"},
]


@pytest.mark.parametrize("related", [True, False])
@pytest.mark.parametrize("settings", AAAI26_SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_the_published_tima_equals_its_formula_in_value_and_gradient(settings, related):
    # The slopes below are those of the minimum over a and b; the product holds both constant in its backward pass.
    case, o = make_case(), AAAI26_DEFAULTS | settings
    if related:  # text that has moved a little, so that the best a is above zero
        case.text = [mixed(t0, t) for t0, t in zip(case.text0, case.text, strict=True)]
    weights = {name: o[f"weight_{name}"] for name in ("tam", "takd", "mhe", "iakd")}
    weights["sc"] = o["weight_mhe"] * o["weight_sc"]

    def loss(adv: Matrix | None = None, clean: Matrix | None = None, text: Matrix | None = None) -> float:
        terms = tima_terms(case, adv=adv or case.adv, clean=clean or case.clean, text=text or case.text, o=o)
        return math.fsum(weights[name] * terms[name] for name in terms)

    total, terms, gradients = run_objective("tima", o, case)
    expected = tima_terms(case, adv=case.adv, clean=case.clean, text=case.text, o=o)
    assert terms == pytest.approx({name: expected[name] for name in terms}, abs=1e-9)
    assert set(terms) == {"tam"} | {name for name, weight in weights.items() if weight}
    assert total == pytest.approx(loss(), abs=1e-9)
    assert_close(gradients["adv"], slopes(lambda rows: loss(adv=rows), case.adv))
    assert_close(gradients["text"], slopes(lambda rows: loss(text=rows), case.text))
    if o["takd_view"] == "clean":
        assert_close(gradients["clean"], slopes(lambda rows: loss(clean=rows), case.clean))


def mixed(a: list[float], b: list[float]) -> list[float]:
    row = [x + 0.2 * y for x, y in zip(a, b, strict=True)]
    return [x / math.sqrt(dot(row, row)) for x in row]


def consistency_of(text: Matrix, text0: Matrix, form: str) -> tuple[float, Matrix]:
    """The product's value and gradient, all pairs counted."""
    pairs = ~torch.eye(len(text), dtype=torch.bool)
    leaf = torch.tensor(text, dtype=torch.float64, requires_grad=True)
    original = centred_similarity(torch.tensor(text0, dtype=torch.float64), pairs)
    value = semantic_consistency(leaf, original, pairs, form)
    return value.item(), torch.autograd.grad(value, leaf)[0].tolist()


def test_no_other_line_with_a_rising_slope_leaves_less_of_the_similarities():
    for seed in range(6):
        text, text0 = unit_rows(C, D, seed), unit_rows(C, D, seed + 50)
        y, x = similarities(text, frozenset()), similarities(text0, frozenset())
        value, _ = consistency_of(text, text0, "affine")

        def residual(a: float, b: float, x: list[float] = x, y: list[float] = y) -> float:
            return math.fsum((q - a * p - b) ** 2 for p, q in zip(x, y, strict=True)) / len(x)

        found = min(residual(a / 100, b / 100) for a in range(101) for b in range(-60, 61))
        assert value - 1e-12 <= found < value + 2e-4


@pytest.mark.parametrize("form", ["affine", "correlation"])
def test_consistency_lets_the_mean_fall_and_differences_shrink_but_not_the_order_turn(form):
    text0 = unit_rows(C, D, 3)
    # One more direction, shared by all classes: similarities become 0.6 x + 0.4, an affine map of the old ones.
    same = [[*(math.sqrt(0.6) * x for x in row), math.sqrt(0.4)] for row in text0]
    value, gradient = consistency_of(same, [[*row, 0.0] for row in text0], form)
    assert value == pytest.approx(0, abs=1e-12)
    assert_close(gradient, [[0.0] * (D + 1)] * C, 1e-7)
    swapped = [text0[i] for i in (3, 4, 5, 0, 1, 2)]
    assert consistency_of(swapped, text0, form)[0] > 0.01


def test_classes_that_are_all_equally_far_apart_have_lost_their_order_and_only_the_correlation_says_so():
    simplex = [[float(i == j) - 1 / C for j in range(C)] for i in range(C)]  # what the energy alone wants
    text = [[x / math.sqrt(dot(row, row)) for x in row] for row in simplex]
    text0 = unit_rows(C, C, 3)
    nearly = [mixed(row, old) for row, old in zip(text, text0, strict=True)]
    assert consistency_of(text, text0, "affine")[0] == pytest.approx(0, abs=1e-12)
    assert consistency_of(text, text0, "correlation")[0] == pytest.approx(1, abs=1e-3)
    assert 0 < consistency_of(nearly, text0, "correlation")[0] < 1  # and there is a way back


@pytest.mark.parametrize(("weight", "kept"), [(0.0, False), (1.0, True)])
def test_the_published_versions_default_keeps_the_order_of_similarities_while_the_energy_falls(weight, kept):
    torch.manual_seed(0)
    pairs = ~torch.eye(12, dtype=torch.bool)
    text0 = F.normalize(torch.randn(12, 24) + 1.0, dim=1)  # a cone, as prompts lie in one
    original, config = centred_similarity(text0, pairs), OBJECTIVES.config_class("tima")(variant="aaai26")
    assert config.weight_sc == 1.0
    projection = torch.eye(24).requires_grad_()
    optimizer = torch.optim.Adam([projection], lr=1e-2)
    energies = []
    for _ in range(300):
        text = F.normalize(text0 @ projection, dim=1)
        energies.append(hyperspherical_energy(text, pairs, config.mhe_form, config.mhe_power))
        optimizer.zero_grad()
        (energies[-1] + weight * semantic_consistency(text, original, pairs, config.sc_form)).backward()
        optimizer.step()
    upper = torch.triu(pairs, 1)
    ranks = [(values @ values.T)[upper].argsort().argsort().double() for values in (text0, text.detach())]
    assert energies[-1] < 0.8 * energies[0]
    assert (torch.corrcoef(torch.stack(ranks))[0, 1].item() > 0.9) is kept


def test_reversed_similarities_are_no_agreement():
    # Three classes: similarities x12, x13, x23 in the plane, and text whose similarities fall where the old ones rise.
    plane = [[math.cos(a), math.sin(a)] for a in (0.0, 0.3, 1.2)]  # closest: 1-2
    other = [[math.cos(a), math.sin(a)] for a in (0.0, 1.2, 0.3)]  # closest: 1-3; 1-2 the farthest
    y = similarities(other, frozenset())
    middle = math.fsum(y) / len(y)
    x = similarities(plane, frozenset())
    assert math.fsum(p * (q - middle) for p, q in zip(x, y, strict=True)) < 0
    assert consistency_of(other, plane, "affine")[0] == pytest.approx(math.fsum((q - middle) ** 2 for q in y) / len(y))


@pytest.mark.parametrize("form", ["affine", "correlation"])
@pytest.mark.parametrize("num_classes", [1, 2])
def test_consistency_of_one_or_two_classes_is_finite(num_classes, form):
    value, gradient = consistency_of(unit_rows(num_classes, D, 0), unit_rows(num_classes, D, 1), form)
    assert math.isfinite(value)
    assert_close(gradient, [[0.0] * D] * num_classes)


def test_the_margin_of_the_preprint_is_made_once_and_the_published_one_follows_the_text():
    case = make_case()
    rows = {key: getattr(case, key) for key in ("adv", "clean", "frozen_adv", "frozen_clean", "text", "text0")}
    for settings, follows in (
        ({}, False),
        ({"variant": "aaai26"}, True),
        ({"variant": "aaai26", "margin_text": "original"}, False),
    ):
        bench = Bench("tima", {"margin_scale": 0.2, **settings}, rows, case.label, scale=SCALE, twins=case.twins)
        bench.objective.loss(bench.ctx)
        assert ("tima/margin" in bench.ctx.constants) is not follows
        assert ("tima/similarity" in bench.ctx.constants) is (settings.get("variant") == "aaai26")
        assert not any(constant.requires_grad for constant in bench.ctx.constants.values())


@pytest.mark.parametrize(
    "setting", [{"weight_sc": 2.0}, {"sc_form": "affine"}, {"margin_text": "original"}, {"margin_shape": "sqrt"}]
)
def test_the_preprints_variant_refuses_settings_of_the_published_one(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value} is for variant=aaai26 .* leave it out"):
        OBJECTIVES.config_class("tima")(**setting)
    OBJECTIVES.config_class("tima")(**setting, variant="aaai26")


@pytest.mark.parametrize("form", ["bounded", "riesz"])
def test_equal_prompts_take_no_part_in_the_energy_or_the_margin(form):
    case = make_case()
    twins = torch.zeros(C, C, dtype=torch.bool)
    twins[2, 5] = twins[5, 2] = True
    text = torch.tensor(case.text, dtype=torch.float64, requires_grad=True)
    pairs = ~twins & ~torch.eye(C, dtype=torch.bool)
    value = hyperspherical_energy(text, pairs, form, 2.0)
    (gradient,) = torch.autograd.grad(value, text)
    assert value.item() == pytest.approx(energy(case.text, case.twins, form, 2.0), abs=1e-12)
    assert value < 100  # one pair at distance zero would make the Riesz energy a million
    assert torch.isfinite(gradient).all()
    margins = adaptive_margin(torch.tensor(case.text0, dtype=torch.float64), twins, 0.02, 0.1)
    assert margins[2, 5] == margins[5, 2] == 0
    assert (margins.diagonal() == 0).all()
    others = margins[~twins & ~torch.eye(C, dtype=torch.bool)]
    assert others.min() == pytest.approx(0.02) and others.max() == pytest.approx(0.12)


@pytest.mark.parametrize("num_classes", [1, 2])
@pytest.mark.parametrize("form", ["bounded", "riesz"])
def test_one_or_two_classes_give_finite_values(num_classes, form):
    text = torch.tensor(unit_rows(num_classes, D, 0), requires_grad=True)
    no_twins = torch.zeros(num_classes, num_classes, dtype=torch.bool)
    value = hyperspherical_energy(text, ~torch.eye(num_classes, dtype=torch.bool), form, 2.0)
    assert torch.isfinite(torch.autograd.grad(value, text)[0]).all()
    assert torch.isfinite(adaptive_margin(text.detach(), no_twins, 0.1, 0.1)).all()


@pytest.mark.parametrize("power", [0.0, 2.0, 12.0])
def test_the_energy_stays_finite_in_float32_where_classes_nearly_coincide(power):
    text = torch.tensor(unit_rows(C, D, 0), dtype=torch.float32)
    text[1] = text[0]
    text[2] = torch.nn.functional.normalize(text[0] + 1e-6, dim=0)
    text.requires_grad_(True)
    value = hyperspherical_energy(text, ~torch.eye(C, dtype=torch.bool), "riesz", power)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, text)[0]).all()


@pytest.mark.parametrize("sign", ["distant", "similar"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"takd_view": "clean", "mhe_form": "riesz", "temperature": 3.0},
        {"variant": "aaai26"},
        {"variant": "aaai26", "margin_shape": "sqrt", "sc_form": "affine"},
    ],
)
def test_tima_without_its_extra_terms_is_tecoa_to_the_last_bit(sign, options):
    case = make_case()
    reduced = OBJECTIVES.build(OBJECTIVES.config_class("tima")()).tecoa_settings
    assert reduced is not None
    total, terms, gradients = run_objective("tima", {**reduced, "margin_sign": sign, **options}, case)
    tecoa_total, _, tecoa_gradients = run_objective("tecoa", {}, case)
    assert total == tecoa_total and list(terms) == ["tam"]
    assert gradients == tecoa_gradients
    assert all(value == 0 for row in gradients["text"] for value in row)


def test_the_bounded_energy_refuses_a_power_that_makes_it_constant():
    with pytest.raises(ValueError, match=r"mhe_power=0 makes the bounded energy constant; .* or mhe_form=riesz"):
        OBJECTIVES.config_class("tima")(mhe_power=0)


def test_logits_pass_no_gradient_to_text_unless_text_is_given():
    text = torch.tensor(unit_rows(C, D, 0), requires_grad=True)
    embed = torch.tensor(unit_rows(B, D, 1), requires_grad=True)
    same = torch.zeros(C, C, dtype=torch.bool)
    ctx = StepContext(torch.zeros(B).long(), torch.tensor(SCALE), text, text.detach(), same, lambda view: None)
    ctx.logits(embed).sum().backward()
    assert text.grad is None and embed.grad is not None
    ctx.logits(embed, text).sum().backward()
    assert isinstance(text.grad, Tensor)


def test_each_view_is_made_at_most_once_and_only_if_read():
    made: list[str] = []

    def make_view(view):
        made.append(view)
        embed = torch.tensor(unit_rows(B, D, 1), dtype=torch.float64)
        return ImageFeatures(embed, embed)

    text = torch.tensor(unit_rows(C, D, 0), dtype=torch.float64)
    ctx = StepContext(torch.zeros(B).long(), torch.tensor(1.0), text, text, torch.zeros(C, C).bool(), make_view)
    assert ctx.adv is ctx.adv and ctx.frozen_clean is ctx.frozen_clean
    assert made == ["adv", "frozen_clean"]
