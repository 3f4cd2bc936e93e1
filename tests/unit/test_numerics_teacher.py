"""Objectives with a teacher or anchors - PMG-AFT, CAW, AGFT, FARE, LAAT - against their formulas in plain float64 loops.

A formula gets the case twice: ``live``, where a leaf may have been moved to take a slope, and ``fixed``, from which it reads
whatever is a constant. So a missing or a needless detach shows in the slopes. B images, C classes, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formula import Bench, Case, Matrix, Vector, assert_close, dot, random_rows, slopes, softmax, unit_rows

torch.set_num_threads(1)

B, C, D = 3, 4, 3
SCALE = 6.5
LABEL = [2, 0, 3]
VIEWS = ("adv", "clean", "clean_fixed", "frozen_adv", "frozen_clean")

Terms = dict[str, float]
Formula = Callable[[Case, Case], Terms]


def make_case() -> Case:
    """Unit embeddings that share nothing with the raw ones, so that one read for the other shows."""
    case: Case = {view: unit_rows(B, D, seed) for seed, view in enumerate(VIEWS)}
    case |= {f"{view}_raw": random_rows(B, D, seed=10 + seed) for seed, view in enumerate(VIEWS)}
    return case | {"text": unit_rows(C, D, 20), "text0": unit_rows(C, D, 21)}


def mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def probabilities(case: Case, view: str, scale: float = SCALE) -> Matrix:
    """p_ic = softmax_c (s <v_i, t_c>)."""
    return [softmax([scale * dot(v, t) for t in case["text"]]) for v in case[view]]


def cross_entropies(p: Matrix) -> Vector:
    return [-math.log(p[i][y]) for i, y in enumerate(LABEL)]


def kl(p: Vector, q: Vector) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def distance(a: Vector, b: Vector) -> float:
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def check(name: str, settings: dict[str, Any], formula: Formula, weights: Terms) -> Bench:
    """Value of each term and of the total, and the gradient of every trained leaf."""
    case = make_case()
    bench = Bench(name, settings, case, LABEL, scale=SCALE)
    total, terms, gradients = bench.loss()
    expected = formula(case, case)
    assert set(terms) == set(expected)
    for term, value in expected.items():
        assert terms[term] == pytest.approx(value, abs=1e-9)

    def loss(live: Case) -> float:
        return math.fsum(weights.get(term, 1.0) * value for term, value in formula(live, case).items())

    assert total == pytest.approx(loss(case), abs=1e-9)
    assert_slopes(gradients, loss, case)
    return bench


def check_attack(name: str, settings: dict[str, Any], formula: Callable[[Case], Vector]) -> None:
    """Value of the attack's loss for each sample, and the gradient of its sum."""
    case = make_case()
    loss_B, gradients = Bench(name, settings, case, LABEL, scale=SCALE).attack_loss()
    assert_close(loss_B, formula(case))
    assert_slopes(gradients, lambda live: math.fsum(formula(live | {"text": case["text"]})), case)


def assert_slopes(gradients: dict[str, Matrix], loss: Callable[[Case], float], case: Case) -> None:
    """Where the product has no gradient at all, the formula must not depend on the leaf."""
    for leaf, gradient in gradients.items():
        if any(value for row in gradient for value in row):
            assert_close(gradient, slopes(lambda rows, leaf=leaf: loss(case | {leaf: rows}), case[leaf]))
        else:
            assert loss(case | {leaf: random_rows(len(gradient), D, seed=30)}) == loss(case)


# PMG-AFT, METHODS.md 7.1: L = CE + a KL(p_0(x_a) || p(x_a)) + b KL(p(x) || p(x_a)).


def pmg_aft(kl_order: str, reduction: str, detach_clean: bool) -> Formula:
    def terms(live: Case, fixed: Case) -> Terms:
        text = {"text": fixed["text"]}  # a constant for images
        p = probabilities(live | text, "adv")
        own = probabilities(fixed, "clean_fixed") if detach_clean else probabilities(live | text, "clean")

        def divergence(target: Matrix) -> float:
            pairs = [(t, q) if kl_order == "target_adv" else (q, t) for t, q in zip(target, p, strict=True)]
            total = math.fsum(kl(*pair) for pair in pairs)
            return total / {"batchmean": B, "sum": 1, "mean": B * C}[reduction]

        frozen = probabilities(fixed, "frozen_adv")
        return {"ce": mean(cross_entropies(p)), "pretrained": divergence(frozen), "clean": divergence(own)}

    return terms


@pytest.mark.parametrize("detach_clean", [True, False])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("kl_order", ["target_adv", "adv_target"])
def test_pmg_aft_equals_its_formula(kl_order, reduction, detach_clean):
    options = {"kl_order": kl_order, "reduction": reduction, "detach_clean": detach_clean}
    weights = {"pretrained": 0.6, "clean": 1.7}
    settings = {f"weight_{term}": weight for term, weight in weights.items()}
    bench = check("pmg_aft", options | settings, pmg_aft(**options), weights)
    assert bench.objective.views == {"adv", "frozen_adv", "clean_fixed" if detach_clean else "clean"}
    assert bench.objective.cost_units(2) == (9 if detach_clean else 11)


@pytest.mark.parametrize(("off", "views"), [("pretrained", {"adv", "clean_fixed"}), ("clean", {"adv", "frozen_adv"})])
def test_a_term_of_pmg_aft_without_weight_is_not_computed(off, views):
    def formula(live: Case, fixed: Case) -> Terms:
        terms = pmg_aft("target_adv", "batchmean", True)(live, fixed)
        return {term: value for term, value in terms.items() if term != off}

    assert check("pmg_aft", {f"weight_{off}": 0}, formula, {}).objective.views == views


# CAW, METHODS.md 5: L = CE + a mean (1 - p_y(x_a)) KL(p(x_a) || p_0(x)) + b mean |f(x_a) - f_0(x_a)|_2.


def caw(kl_order: str, detach_weight: bool, normalize_features: bool) -> Formula:
    def terms(live: Case, fixed: Case) -> Terms:
        p = probabilities(live | {"text": fixed["text"]}, "adv")
        sure = probabilities(fixed, "adv") if detach_weight else p
        weighted = []
        for i, target in enumerate(probabilities(fixed, "frozen_clean")):
            divergence = kl(p[i], target) if kl_order == "adv_target" else kl(target, p[i])
            weighted.append((1 - sure[i][LABEL[i]]) * divergence)
        kind = "" if normalize_features else "_raw"
        apart = [distance(*pair) for pair in zip(live[f"adv{kind}"], fixed[f"frozen_adv{kind}"], strict=True)]
        return {"ce": mean(cross_entropies(p)), "confidence": mean(weighted), "features": mean(apart)}

    return terms


@pytest.mark.parametrize("normalize_features", [True, False])
@pytest.mark.parametrize("detach_weight", [True, False])
@pytest.mark.parametrize("kl_order", ["adv_target", "target_adv"])
def test_caw_equals_its_formula(kl_order, detach_weight, normalize_features):
    options = {"kl_order": kl_order, "detach_weight": detach_weight, "normalize_features": normalize_features}
    weights = {"confidence": 1.3, "features": 0.4}
    settings = {f"weight_{term}": weight for term, weight in weights.items()}
    bench = check("caw", options | settings, caw(**options), weights)
    assert bench.objective.views == {"adv", "frozen_clean", "frozen_adv"}
    assert bench.objective.cost_units(2) == 9


@pytest.mark.parametrize(
    ("off", "views"), [("confidence", {"adv", "frozen_adv"}), ("features", {"adv", "frozen_clean"})]
)
def test_a_term_of_caw_without_weight_is_not_computed(off, views):
    def formula(live: Case, fixed: Case) -> Terms:
        terms = caw("adv_target", True, True)(live, fixed)
        return {term: value for term, value in terms.items() if term != off}

    assert check("caw", {f"weight_{off}": 0}, formula, {}).objective.views == views


@pytest.mark.parametrize(("normalize_features", "kind"), [(True, ""), (False, "_raw")])
def test_features_that_have_not_moved_pull_nowhere(normalize_features, kind):
    case = make_case()
    case[f"frozen_adv{kind}"][0] = list(case[f"adv{kind}"][0])
    options = {"normalize_features": normalize_features, "weight_confidence": 0}
    _, terms, pulled = Bench("caw", options, case, LABEL, scale=SCALE).loss()
    _, _, alone = Bench("caw", options | {"weight_features": 0}, case, LABEL, scale=SCALE).loss()
    expected = caw("adv_target", True, normalize_features)(case, case)
    assert terms["features"] == pytest.approx(expected["features"], abs=1e-12)
    assert pulled[f"adv{kind}"][0] == alone[f"adv{kind}"][0]
    assert pulled[f"adv{kind}"][1] != alone[f"adv{kind}"][1]


# AGFT, METHODS.md 10.1: the label becomes q = softmax(g k s <v_0(x), t>), in the loss and in the attack.


def agft(k: float, g: float) -> Callable[[Case, Case], Vector]:
    def losses(live: Case, fixed: Case) -> Vector:
        p = probabilities(live | {"text": fixed["text"]}, "adv", k * SCALE)
        q = probabilities(fixed, "frozen_clean", g * k * SCALE)
        return [-math.fsum(q[i][c] * math.log(p[i][c]) for c in range(C)) for i in range(B)]

    return losses


@pytest.mark.parametrize(("scale_factor", "target_ratio"), [(1.8, 0.4), (1.0, 1.0), (0.7, 1.6)])
def test_agft_equals_its_formula_in_loss_and_attack(scale_factor, target_ratio):
    settings = {"scale_factor": scale_factor, "target_ratio": target_ratio}
    losses = agft(scale_factor, target_ratio)
    bench = check("agft", settings, lambda live, fixed: {"soft_ce": mean(losses(live, fixed))}, {})
    assert bench.objective.views == {"adv", "frozen_clean"} and bench.objective.cost_units(2) == 8
    case = make_case()
    check_attack("agft", settings, lambda live: losses(live, case))


def test_agft_trains_clip_at_180_with_targets_at_72():
    case = make_case()
    total, _, _ = Bench("agft", {}, case, LABEL, scale=100).loss()
    p, q = probabilities(case, "adv", 180), probabilities(case, "frozen_clean", 72)
    expected = mean(-math.fsum(q[i][c] * math.log(p[i][c]) for c in range(C)) for i in range(B))
    assert total == pytest.approx(expected, rel=1e-12)


# FARE, METHODS.md 8.1: |f(z) - f_0(x)|_2^2 of embeddings before normalisation; Sim-CLIP, 10.1: -cos / 2.


def fare_losses(live: Case, fixed: Case, view: str, form: str) -> Vector:
    if form == "cosine":
        return [-dot(a, b) / 2 for a, b in zip(live[view], fixed["frozen_clean"], strict=True)]
    return [distance(a, b) ** 2 for a, b in zip(live[f"{view}_raw"], fixed["frozen_clean_raw"], strict=True)]


@pytest.mark.parametrize("weight_clean", [0.0, 0.8])
@pytest.mark.parametrize("form", ["l2", "cosine"])
def test_fare_equals_its_formula_in_loss_and_attack(form, weight_clean):
    def formula(live: Case, fixed: Case) -> Terms:
        views = ["adv", "clean"] if weight_clean else ["adv"]
        return {view: mean(fare_losses(live, fixed, view, form)) for view in views}

    settings = {"distance": form, "weight_clean": weight_clean}
    bench = check("fare", settings, formula, {"clean": weight_clean})
    assert bench.objective.views == {"adv", "frozen_clean"} | ({"clean"} if weight_clean else set())
    assert bench.objective.cost_units(2) == (11 if weight_clean else 8)
    case = make_case()
    check_attack("fare", settings, lambda live: fare_losses(live, case, "adv", "l2"))


@pytest.mark.parametrize("name", ["agft", "fare"])
def test_neither_reads_labels(name):
    case = make_case()
    benches = [Bench(name, {}, case, label, scale=SCALE) for label in (LABEL, [-1] * B)]
    assert benches[0].objective.uses_classes == (name == "agft")  # it reads class names, no labels
    assert benches[0].loss() == benches[1].loss()
    assert benches[0].attack_loss() == benches[1].attack_loss()


# LAAT, METHODS.md 6.1: L = CE(<v(x_a), a'> / tau, y) - b mean <v(x), v(x_a)>; tests/unit/test_anchors.py has the a'.


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.25, 4.0), ("model", SCALE)])
@pytest.mark.parametrize("weight_trades", [0.0, 1.0, 0.3])
def test_laat_equals_its_formula_in_loss_and_attack(temperature, scale, weight_trades):
    def losses(live: Case) -> Vector:
        return cross_entropies(probabilities(live, "adv", scale))

    def formula(live: Case, fixed: Case) -> Terms:
        terms = {"ce": mean(losses(live | {"text": fixed["text"]}))}
        if weight_trades:
            terms["trades"] = -mean(dot(a, b) for a, b in zip(live["clean"], live["adv"], strict=True))
        return terms

    settings = {"temperature": temperature, "weight_trades": weight_trades}
    bench = check("laat", settings, formula, {"trades": weight_trades})
    assert bench.objective.views == ({"adv", "clean"} if weight_trades else {"adv"})
    assert bench.objective.cost_units(2) == (10 if weight_trades else 7)
    check_attack("laat", settings, losses)


def test_laat_expands_text_unless_told_otherwise():
    case = make_case()
    assert Bench("laat", {}, case, LABEL, scale=SCALE).objective.expands_text
    assert not Bench("laat", {"expand": False}, case, LABEL, scale=SCALE).objective.expands_text
