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
    for leaf, gradient in gradients.items():
        if any(value for row in gradient for value in row):
            assert_close(gradient, slopes(lambda rows, leaf=leaf: loss(case | {leaf: rows}), case[leaf]))
        else:
            assert loss(case | {leaf: random_rows(len(gradient), D, seed=30)}) == loss(case)
    return bench


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
