"""Objectives on attention maps (TGA-ZSR, Comp-TGA, CCR and CCS) against their formulas, written again in plain float64 loops.

B images, C classes, D embedding width, GRID rows and columns of patches, SIZE pixels on a map's side. Maps at the published
size are compared with torch's own interpolation of every pixel, which the code under test does not use.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formula import Bench, Case, Matrix, Vector, assert_close, assert_zero, dot, random_rows, slopes, unit_rows
from torch import Tensor

from zsr.config.schema import OBJECTIVES
from zsr.models import ImageFeatures, ImageTower
from zsr.objectives.attention_map import bilinear_matrix, extreme_pixels, grid_of, min_max, triangular_factor
from zsr.objectives.base import StepContext

torch.set_num_threads(1)

B, C, D = 3, 4, 3
GRID, SIZE = (2, 3), 5
SCALE = 5.0
LABEL = [2, 0, 3]
VIEWS = ("adv", "clean", "frozen_clean")


class GridBench(Bench):
    """A bench whose views know the grid of their patches."""

    grid = GRID

    def features(self, view: str) -> ImageFeatures:
        return dataclasses.replace(super().features(view), grid=self.grid)


def make_case(grid: tuple[int, int] = GRID, class_token: bool = True) -> Case:
    case: Case = {"text": unit_rows(C, D, 20), "text0": unit_rows(C, D, 20), "text:complement": unit_rows(C, D, 21)}
    for seed, view in enumerate(VIEWS):
        case[view] = unit_rows(B, D, seed)
        case[f"{view}_tokens"] = random_rows(B, grid[0] * grid[1], D, seed=seed + 10)
        if class_token:
            case[f"{view}_class_token"] = random_rows(B, D, seed=seed + 30)
    return case


# The formulas.


def cross_entropy(images: Matrix, text: Matrix) -> float:
    losses = [
        math.log(math.fsum(math.exp(SCALE * dot(v, t)) for t in text)) - SCALE * dot(v, text[y])
        for v, y in zip(images, LABEL, strict=True)
    ]
    return math.fsum(losses) / B


def resized(patches: Vector, size: int) -> Vector:
    """Bilinear, half-pixel centres, the border repeated; row by row."""
    rows, columns = GRID
    pixels = []
    for i, j in itertools.product(range(size), repeat=2):
        y, x = max((i + 0.5) * rows / size - 0.5, 0.0), max((j + 0.5) * columns / size - 0.5, 0.0)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
        upper = patches[y0 * columns + x0] * (1 - (x - x0)) + patches[y0 * columns + x1] * (x - x0)
        lower = patches[y1 * columns + x0] * (1 - (x - x0)) + patches[y1 * columns + x1] * (x - x0)
        pixels.append(upper * (1 - (y - y0)) + lower * (y - y0))
    return pixels


def from_0_to_1(values: Vector) -> Vector:
    return [(value - min(values)) / (max(values) - min(values)) for value in values]


def one_map(tokens: Matrix, class_token: Vector | None, text: Vector, o: dict[str, Any]) -> Vector:
    """Pixels of the normalised map of one image and one prompt."""
    if o["map_axis"] == "token":
        all_tokens = tokens if class_token is None else [class_token, *tokens]
        norms = [math.sqrt(math.fsum(token[d] ** 2 for token in all_tokens)) for d in range(D)]
        fit = [math.fsum(token[d] / norms[d] * text[d] for d in range(D)) for token in tokens]
    else:
        fit = [dot(token, text) / math.sqrt(dot(token, token)) for token in tokens]
    if o["map_order"] == "normalize_first":
        return resized(from_0_to_1(fit), SIZE)
    return from_0_to_1(resized(fit, SIZE))


def attention(name: str, case: Case, y: int, tokens: Matrix, class_token: Vector | None, o: dict[str, Any]) -> Vector:
    """A of one image: the true class's map, or for Comp-TGA that times one minus the complement's."""
    pixels = one_map(tokens, class_token, case["text0"][y], o)
    if name == "tga_zsr":
        return pixels
    complement = one_map(tokens, class_token, case["text:complement"][y], o)
    return [a * (1 - b) for a, b in zip(pixels, complement, strict=True)]


def norm_of(name: str, case: Case, o: dict[str, Any], i: int) -> Callable[[Matrix, Vector | None], float]:
    """Norm, over all pixels, of A - A_0 of image i as a function of its tokens and class token."""
    frozen_class = case["frozen_clean_class_token"][i] if "frozen_clean_class_token" in case else None
    a_0 = attention(name, case, LABEL[i], case["frozen_clean_tokens"][i], frozen_class, o)

    def norm(tokens: Matrix, class_token: Vector | None) -> float:
        a = attention(name, case, LABEL[i], tokens, class_token, o)
        return math.sqrt(math.fsum((p - q) ** 2 for p, q in zip(a, a_0, strict=True)))

    return norm


def slopes_of(
    norm: Callable[[Matrix, Vector | None], float], tokens: Matrix, class_token: Vector | None
) -> tuple[Matrix, Vector | None]:
    of_class = None if class_token is None else slopes(lambda x: norm(tokens, x), class_token, h=1e-3)
    return slopes(lambda x: norm(x, class_token), tokens, h=1e-3), of_class


# The comparisons.

MAPS = ["tga_zsr", "comp_tga"]
WEIGHTS = {"weight_ar": 0.6, "weight_amc": 0.35, "map_size": SIZE}
SETTINGS = [
    ({"map_axis": axis, "map_order": order, **weights}, class_token)
    for axis, order, class_token, weights in [
        ("token", "normalize_first", True, {}),
        ("token", "normalize_first", False, {}),
        ("token", "resize_first", True, {}),
        ("feature", "normalize_first", True, {}),
        ("feature", "resize_first", False, {}),
        ("token", "normalize_first", True, {"weight_ar": 0.0}),
        ("token", "normalize_first", True, {"weight_amc": 0.0}),
    ]
]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("options", "class_token"), SETTINGS, ids=lambda x: str(x))
def test_attention_objectives_equal_their_formula_in_value_and_gradient(name, options, class_token):
    case, o = make_case(class_token=class_token), WEIGHTS | options
    total, terms, gradients = GridBench(name, o, case, LABEL, scale=SCALE).loss()
    assert terms["ce"] == pytest.approx(cross_entropy(case["adv"], case["text"]), abs=1e-12)
    expected_total = terms["ce"]
    assert_close(gradients.pop("adv"), slopes(lambda rows: cross_entropy(rows, case["text"]), case["adv"]), 1e-9)
    for term, view in (("ar", "adv"), ("amc", "clean")):
        weight, tokens = o[f"weight_{term}"], case[f"{view}_tokens"]
        if not weight:
            assert term not in terms
            continue
        class_tokens = case.get(f"{view}_class_token", [None] * B)
        norms = [norm_of(name, case, o, i) for i in range(B)]
        value = math.fsum(norm(tokens[i], class_tokens[i]) for i, norm in enumerate(norms)) / B
        assert value > 0.1
        assert terms[term] == pytest.approx(value, abs=1e-9)
        expected_total += weight * value
        by_token, by_class = gradients.pop(f"{view}_tokens"), gradients.get(f"{view}_class_token")
        for i, norm in enumerate(norms):
            share = weight / B
            of_tokens, of_class = slopes_of(norm, tokens[i], class_tokens[i])
            assert_close(by_token[i], [[share * x for x in row] for row in of_tokens])
            if by_class:
                assert_close(by_class[i], [share * x for x in of_class])
        gradients.pop(f"{view}_class_token", None)
    assert total == pytest.approx(expected_total, abs=1e-9)
    for rest in gradients.values():  # text, embeddings of the clean view, what a weight of zero leaves out
        assert_zero(rest)


def pixels_by_torch(name: str, features: ImageFeatures, bench: Bench, order: str, size: int) -> Tensor:
    """A at full size ``[B, S, S]`` of cosine maps, every pixel interpolated and then compared."""

    def one(text_CD: Tensor) -> Tensor:
        tokens_BPD = features.tokens_BPD / features.tokens_BPD.norm(dim=-1, keepdim=True)
        fit_B1hw = torch.einsum("bpd,bd->bp", tokens_BPD, text_CD[bench.ctx.label_B]).view(B, 1, *features.grid)
        steps = [
            lambda x: F.interpolate(x, (size, size), mode="bilinear", align_corners=False),
            lambda x: (x - x.amin((2, 3), True)) / (x.amax((2, 3), True) - x.amin((2, 3), True)),
        ]
        for step in steps[:: 1 if order == "resize_first" else -1]:
            fit_B1hw = step(fit_B1hw)
        return fit_B1hw[:, 0]

    pixels_BSS = one(bench.ctx.text0_CD)
    return pixels_BSS if name == "tga_zsr" else pixels_BSS * (1 - one(bench.ctx.extra_text_CD["complement"]))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("order", ["normalize_first", "resize_first"])
@pytest.mark.parametrize(("grid", "size"), [((7, 7), 224), ((4, 6), 224), ((14, 2), 224), ((7, 7), 7), ((5, 3), 6)])
def test_the_norm_of_a_few_numbers_is_the_norm_of_all_pixels(name, order, grid, size):
    settings = {"map_axis": "feature", "map_order": order, "map_size": size}
    bench = GridBench(name, settings, make_case(grid), LABEL, scale=SCALE)
    bench.grid = grid
    _, terms, _ = bench.loss()
    shown = {view: pixels_by_torch(name, bench.features(view), bench, order, size) for view in VIEWS}
    for term, view in (("ar", "adv"), ("amc", "clean")):
        expected = (shown[view] - shown["frozen_clean"]).flatten(1).norm(dim=1).mean().item()
        assert terms[term] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("grid", [(7, 7), (4, 6), (1, 1), (1, 5), (13, 2)])
@pytest.mark.parametrize("size", [13, 32, 224])
def test_resizing_its_gram_matrix_and_its_extremes_are_those_of_interpolation(grid, size):
    rows, columns = (bilinear_matrix(count, size) for count in grid)
    map_Bhw = torch.randn(20, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected_BSS = F.interpolate(map_Bhw[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(rows @ map_Bhw @ columns.T, expected_BSS, rtol=0, atol=1e-12)
    # The P x P Gram matrix of all pixels, and the same from the two sides' factors.
    pixels_HP = torch.kron(rows, columns)
    factor_PP = torch.kron(*(triangular_factor(side) for side in (rows, columns)))
    assert torch.allclose(factor_PP.T @ factor_PP, pixels_HP.T @ pixels_HP, rtol=0, atol=1e-9)
    ends = extreme_pixels(grid[0], size) @ map_Bhw @ extreme_pixels(grid[1], size).T
    assert ends[0].numel() <= 4 * grid[0] * grid[1]
    assert torch.allclose(ends.amin((1, 2)), expected_BSS.amin((1, 2)), rtol=0, atol=1e-12)
    assert torch.allclose(ends.amax((1, 2)), expected_BSS.amax((1, 2)), rtol=0, atol=1e-12)


def test_a_map_larger_than_its_size_is_refused():
    with pytest.raises(ValueError, match=r"objective.map_size=2: is smaller than .* 3 on a side; use 3 or more"):
        GridBench("tga_zsr", {"map_size": 2}, make_case(), LABEL, scale=SCALE).loss()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("order", ["normalize_first", "resize_first"])
def test_equal_maps_cost_nothing_and_pull_nowhere(name, order):
    case = make_case()
    for view in ("adv", "clean"):
        case[f"{view}_tokens"] = case["frozen_clean_tokens"]
        case[f"{view}_class_token"] = case["frozen_clean_class_token"]
    total, terms, gradients = GridBench(name, {"map_order": order}, case, LABEL, scale=SCALE).loss()
    assert terms["ar"] == terms["amc"] == 0 and total == terms["ce"]
    for view in ("adv", "clean"):
        assert_zero(gradients[f"{view}_tokens"])


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("order", ["normalize_first", "resize_first"])
def test_a_constant_map_is_zero_and_its_gradient_finite(name, order):
    case = make_case()
    case["adv_tokens"] = [[[0.5, -1.0, 2.0]] * (GRID[0] * GRID[1])] * B  # every patch alike
    case["clean_tokens"] = [[[0.0, 0.0, 0.0]] * (GRID[0] * GRID[1])] * B
    case["clean_class_token"] = [[0.0, 0.0, 0.0]] * B
    _, terms, gradients = GridBench(name, {"map_order": order, "map_size": SIZE}, case, LABEL, scale=SCALE).loss()
    assert all(math.isfinite(value) for value in terms.values())
    assert torch.isfinite(torch.tensor([gradients["adv_tokens"], gradients["clean_tokens"]])).all()
    flat = torch.full((1, 1, 4, 4), 0.7, dtype=torch.float64)
    assert_zero(min_max(flat, flat).tolist())
    tiny = torch.tensor([[[[0.0, 1e-300]]]], dtype=torch.float64)  # a guard must not touch what is not constant
    assert min_max(tiny, tiny).tolist() == [[[[0.0, 1.0]]]]


@pytest.mark.parametrize("name", MAPS)
def test_without_its_extra_weights_it_is_tecoa_to_the_last_bit(name):
    case = make_case()
    bench = Bench(name, {"weight_ar": 0.0, "weight_amc": 0.0, "map_axis": "feature"}, case, LABEL, scale=SCALE)
    assert bench.objective.views == {"adv"}
    assert bench.loss() == (lambda t, x, g: (t, {"ce": x["ce"]}, g))(
        *Bench("tecoa", {}, case, LABEL, scale=SCALE).loss()
    )


@pytest.mark.parametrize("name", MAPS)
def test_weights_decide_the_views_and_the_cost(name):
    def made(**settings: float) -> tuple[set[str], int]:
        objective = OBJECTIVES.build(OBJECTIVES.config_class(name)(**settings))
        return set(objective.views), objective.cost_units(2)

    assert made() == ({"adv", "clean", "frozen_clean"}, 11)
    assert made(weight_amc=0) == ({"adv", "frozen_clean"}, 8)
    assert made(weight_ar=0) == ({"adv", "clean", "frozen_clean"}, 11)
    assert made(weight_ar=0, weight_amc=0) == ({"adv"}, 7)


def test_the_complement_has_a_prompt_of_its_own_with_the_class_name():
    config = OBJECTIVES.config_class("comp_tga")
    assert OBJECTIVES.build(config()).extra_templates == {"complement": "This is not a photo of a {}"}
    assert OBJECTIVES.build(config(complement_template="no {}")).extra_templates == {"complement": "no {}"}
    assert OBJECTIVES.build(config(weight_ar=0, weight_amc=0)).extra_templates == {}
    with pytest.raises(ValueError, match=r"complement_template\n.*needs {} where the class name goes"):
        config(complement_template="This is the background of the image")


@pytest.mark.parametrize("name", MAPS)
def test_frozen_maps_are_kept_by_sample_as_one_number_a_patch(name):
    kept = []

    def keep(key: str, of: Any) -> Tensor:
        kept.append((key, of(bench.ctx.frozen_clean, bench.ctx.label_B)))
        return kept[-1][1]

    keys = set()
    for order in ("normalize_first", "resize_first"):
        bench = GridBench(name, {"map_order": order}, make_case(), LABEL, scale=SCALE)
        direct = bench.loss()
        bench = GridBench(name, {"map_order": order}, make_case(), LABEL, scale=SCALE)
        bench.ctx.cached_per_sample = keep
        assert bench.loss() == direct
        key, rows = kept.pop()
        assert not kept, "once a step, for both terms"
        assert rows.shape == (B, {"tga_zsr": 1, "comp_tga": 2}[name], *GRID)
        keys.add(key)
    assert len(keys) == 2, "rows of other settings must not be taken for these"


def test_without_a_grid_a_square_is_assumed_and_nothing_else():
    tokens_BPD = torch.zeros(1, 6, D)
    assert grid_of(ImageFeatures(tokens_BPD[:, 0], tokens_BPD[:, 0], tokens_BPD, grid=(2, 3))) == (2, 3)
    assert grid_of(ImageFeatures(tokens_BPD[:, 0], tokens_BPD[:, 0], tokens_BPD[:, :4])) == (2, 2)
    with pytest.raises(ValueError, match=r"6 patch tokens make no square map; give ImageFeatures.grid"):
        grid_of(ImageFeatures(tokens_BPD[:, 0], tokens_BPD[:, 0], tokens_BPD))


# CCR and CCS.

TWINS = frozenset({(2, 3), (3, 2)})  # classes 2 and 3 have one prompt: neither may be swapped in for the other


def unit(row: Vector) -> Vector:
    return [x / math.sqrt(dot(row, row)) for x in row]


def constraint_case() -> Case:
    case: Case = {"adv": unit_rows(B, D, 0), "adv_tokens": random_rows(B, 4, D, seed=41)}
    case["text"], case["text0"] = unit_rows(C, D, 42), unit_rows(C, D, 43)
    for key in ("text", "text0"):
        case[key][3] = list(case[key][2])
    return case


def swapped_in(case: Case, label: list[int], i: int, swap: str) -> int | None:
    """The class that takes the place of image i's; None if there is none."""
    usable = [j for j in range(len(case["text"])) if j != label[i] and (label[i], j) not in TWINS]
    if swap == "batch":
        following = [*label[i + 1 :], *label[:i]]
        return next((j for j in following if j in usable), None)
    return max(usable, key=lambda j: dot(case["text0"][label[i]], case["text0"][j]), default=None)


def constraint(case: Case, tokens: Matrix, label: list[int], i: int, term: str, o: dict[str, Any]) -> float:
    """The hinge of image i."""
    t_y = case["text"][label[i]]
    units = [unit(token) for token in tokens]
    fits = [math.exp(dot(u, t_y) / o["temperature"]) for u in units]
    w = [fit / math.fsum(fits) for fit in fits]
    attended = unit([math.fsum(w[p] * units[p][d] for p in range(len(w))) for d in range(D)])
    if term == "ccs":
        j = swapped_in(case, label, i, o["swap"])
        return 0.0 if j is None else max(0.0, o["margin"] - dot(t_y, attended) + dot(case["text"][j], attended))
    reversed_w = [(1 - x) / math.fsum(1 - y for y in w) for x in w]
    left_out = unit([math.fsum(reversed_w[p] * units[p][d] for p in range(len(w))) for d in range(D)])
    return max(0.0, o["margin"] - dot(t_y, attended) + dot(t_y, left_out))


CONSTRAINTS = {"weight_ccr": 0.7, "weight_ccs": 1.3, "margin": 0.4, "temperature": 0.6, "swap": "confusable"}


@pytest.mark.parametrize("label", [[2, 0, 3], [3, 2, 3], [1, 1, 0]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"swap": "batch"},
        {"margin": 0.0},
        {"margin": 3.0, "temperature": 0.05},
        {"weight_ccr": 0.0},
        {"weight_ccs": 0.0},
    ],
    ids=str,
)
def test_the_constraints_equal_their_formula_in_value_and_gradient(options, label):
    case, o = constraint_case(), CONSTRAINTS | options
    total, terms, gradients = Bench("ccr_ccs", o, case, label, scale=SCALE, twins=TWINS).loss()
    _, tecoa, of_tecoa = Bench("tecoa", {}, case, label, scale=SCALE, twins=TWINS).loss()
    weights = {term: o[f"weight_{term}"] for term in ("ccr", "ccs") if o[f"weight_{term}"]}
    assert set(terms) == {"ce", *weights}
    assert terms["ce"] == tecoa["ce"]
    for term in weights:
        expected = math.fsum(constraint(case, case["adv_tokens"][i], label, i, term, o) for i in range(B)) / B
        assert terms[term] == pytest.approx(expected, abs=1e-9)
    expected = terms["ce"] + math.fsum(weight * terms[term] for term, weight in weights.items())
    assert total == pytest.approx(expected, abs=1e-9)
    by_token = gradients.pop("adv_tokens")
    for i in range(B):

        def part(tokens: Matrix, i: int = i) -> float:
            return math.fsum(w * constraint(case, tokens, label, i, term, o) / B for term, w in weights.items())

        assert_close(by_token[i], slopes(part, case["adv_tokens"][i], h=1e-3))
    of_tecoa.pop("adv_tokens")
    assert gradients == of_tecoa


def test_the_cases_see_both_sides_of_the_hinge_and_both_kinds_of_swap():
    case = constraint_case()
    for term in ("ccr", "ccs"):
        hinges = [constraint(case, case["adv_tokens"][i], LABEL, i, term, CONSTRAINTS) for i in range(B)]
        assert min(hinges) == 0 and max(hinges) > 0.1
    swaps = [[swapped_in(case, LABEL, i, swap) for i in range(B)] for swap in ("confusable", "batch")]
    assert swaps[0] != swaps[1] and LABEL[2] == 3 and swaps[1][2] == 0  # 2 follows, a twin of 3


def test_a_batch_of_one_prompt_has_nothing_to_swap_in():
    case, label = constraint_case(), [3, 2, 3]
    assert [swapped_in(case, label, i, "batch") for i in range(B)] == [None] * B
    _, terms, _ = Bench("ccr_ccs", {"swap": "batch"}, case, label, scale=SCALE, twins=TWINS).loss()
    assert terms["ccs"] == 0
    alone = {key: rows[:1] for key, rows in case.items()}
    _, terms, _ = Bench("ccr_ccs", {"swap": "confusable"}, alone, [0], scale=SCALE).loss()
    assert terms["ccs"] == 0


def test_without_its_constraints_it_is_tecoa_to_the_last_bit():
    bench = Bench("ccr_ccs", {"weight_ccr": 0, "weight_ccs": 0}, constraint_case(), LABEL, scale=SCALE)
    assert bench.objective.views == {"adv"} and bench.objective.cost_units(2) == 7
    assert bench.loss() == Bench("tecoa", {}, constraint_case(), LABEL, scale=SCALE).loss()


# Towers.


def make_tower(kind: str) -> ImageTower:
    from open_clip.modified_resnet import (
        ModifiedResNet,
    )  # after zsr, which makes torchvision importable beside CPU torch
    from open_clip.transformer import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "resnet":
            visual = ModifiedResNet([1, 1, 1, 1], output_dim=16, heads=4, image_size=64, width=8)
        else:
            size = {"image_size": (32, 48), "patch_size": 16, "width": 16, "layers": 1, "heads": 2, "mlp_ratio": 2.0}
            visual = VisionTransformer(**size, output_dim=16, pool_type=kind)
    return ImageTower(visual, (0.5,) * 3, (0.25,) * 3, "fp32").eval()


@pytest.mark.parametrize("kind", ["tok", "avg", "resnet"])
@pytest.mark.parametrize("name", [*MAPS, "ccr_ccs"])
def test_towers_of_every_kind_get_finite_terms_and_gradients(name, kind):
    tower, generator = make_tower(kind), torch.Generator().manual_seed(2)
    image_BCHW = torch.rand(B, 3, *((64, 64) if kind == "resnet" else (32, 48)), generator=generator)
    text_CD, other_CD = (F.normalize(torch.randn(C, 16, generator=generator), dim=-1) for _ in range(2))
    views = {"adv": image_BCHW.flip(2), "clean": image_BCHW, "frozen_clean": image_BCHW}

    def make_view(view: str) -> ImageFeatures:
        with torch.set_grad_enabled(view != "frozen_clean"):
            return tower(views[view], tokens=True)

    same_CC = torch.zeros(C, C, dtype=torch.bool)
    ctx = StepContext(torch.tensor(LABEL), torch.tensor(SCALE), text_CD, text_CD, same_CC, make_view)
    ctx.extra_text_CD = {"complement": other_CD}
    loss = OBJECTIVES.build(OBJECTIVES.config_class(name)()).loss(ctx)
    loss.total.backward()
    moved = {"tga_zsr": "ar", "comp_tga": "ar", "ccr_ccs": "ccs"}[name]
    assert loss.terms[moved] > 0 and all(torch.isfinite(term) for term in loss.terms.values())
    gradients = [p.grad for p in tower.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    if name in MAPS:
        assert loss.terms["amc"] < 1e-3 * loss.terms["ar"]  # the tower has not moved
