"""The tests that every registered objective gets for free: write ``zsr/objectives/yours.py`` and they run on it.

Each runs the objective with its default settings in a real training step of a tiny CLIP whose weights have moved a little
from the pre-trained ones, so that frozen and trained views differ. Golden values are in ``tests/golden/objectives.json``;
after a change that is meant to alter them, rewrite the file with

    python tests/unit/test_objective_free.py golden
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # also when run as a script, for the golden values and as a rank

from tiny_clip import write_tiny_clip

import zsr.objectives.base as objectives_base
from zsr.attacks.noise import sample_seeds
from zsr.config import load_config
from zsr.config.schema import OBJECTIVES
from zsr.engine.distributed import average_gradients
from zsr.engine.step import TrainStep
from zsr.models import ImageFeatures, TextBank, load_model
from zsr.objectives.base import FROZEN_VIEWS, TRAINED_VIEWS, StepContext
from zsr.objectives.catalog import entry, stated_units

torch.set_num_threads(1)

GOLDEN = Path(__file__).parents[1] / "golden" / "objectives.json"
NAMES = OBJECTIVES.names()
TECOA_SETTINGS = {name: OBJECTIVES.build(OBJECTIVES.config_class(name)()).tecoa_settings for name in NAMES}
CLASSES = ["cat", "dog", "boat", "tree", "red car"]
BATCH, STEPS = 8, 2


@dataclass
class Made:
    """A step and its batch."""

    step: TrainStep
    image_BCHW: Tensor
    label_B: Tensor
    seeds: list[int]

    def run(self, rows: slice = slice(None)) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        """Loss, terms, and gradients by parameter name, of the batch or a part of it."""
        self.step.model.zero_grad(set_to_none=True)
        output = self.step(self.image_BCHW[rows], self.label_B[rows], self.seeds[rows], progress=0.5)
        output.loss.total.backward()
        terms = {name: term.item() for name, term in output.loss.terms.items()}
        return output.loss.total.item(), terms, self.gradients()

    def gradients(self) -> dict[str, Tensor]:
        named = self.step.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}


def make(
    folder: Path, name: str, settings: dict[str, object] | None = None, precision: str = "fp32", steps: int = STEPS
):
    """A step of objective ``name`` on a seeded tiny model and batch."""
    config = load_config(
        "default",
        [
            f"model.name={write_tiny_clip(folder / 'model')}",
            f"objective.name={name}",
            *(f"objective.{key}={value}" for key, value in (settings or {}).items()),
            "attack.eps=8/255",
            "attack.step_size=4/255",
            f"attack.steps={steps}",
        ],
    )
    model = load_model(config.model, precision)
    step = TrainStep(config, model, TextBank(model), CLASSES, ["a photo of a {}."])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in step.parameters:
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.train()
    image = torch.rand(BATCH, 3, model.image_size, model.image_size, generator=generator)
    label = torch.arange(BATCH) % len(CLASSES)
    return Made(step, image, label, sample_seeds([f"sample {i}" for i in range(BATCH)], "train", 0))


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Distance of two sets of gradients in units of the expected one's length."""
    assert set(found) == set(expected)
    distance = sum((found[name].double() - expected[name].double()).square().sum() for name in expected) ** 0.5
    return float(distance / sum(g.double().square().sum() for g in expected.values()) ** 0.5)


def test_there_are_objectives_to_test():
    assert len(NAMES) >= 3 and {"clean", "tecoa", "tima"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_and_every_term_are_finite(tmp_path, name):
    total, terms, gradients = make(tmp_path, name).run()
    assert terms and torch.isfinite(torch.tensor([total, *terms.values()])).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_the_image_tower_and_nothing_frozen(tmp_path, name):
    made = make(tmp_path, name)
    frozen = [] if made.step.frozen is None else list(made.step.frozen.parameters())
    before = [p.detach().clone() for p in (*made.step.model.parameters(), *frozen)]
    _, _, gradients = made.run()
    trained = {n for n, p in made.step.model.named_parameters() if n.startswith("image.") and p.requires_grad}
    assert {n for n in gradients if n != "text_projection"} == trained
    assert sum(bool((gradients[n] != 0).any()) for n in trained) > 0.9 * len(trained)  # keys' biases cancel in softmax
    assert ("text_projection" in gradients) == made.step.objective.tunes_text
    if made.step.objective.tunes_text:
        assert (gradients["text_projection"] != 0).any()
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    after = [*made.step.model.parameters(), *frozen]
    assert all(torch.equal(value, p) for value, p in zip(before, after, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_attack_loss_is_per_sample_and_follows_a_permutation(tmp_path, name):
    made = make(tmp_path, name)
    step, order = made.step, torch.randperm(BATCH, generator=torch.manual_seed(0))

    def attack_loss(rows: Tensor) -> Tensor:
        image, tokens = made.image_BCHW[rows], step.objective.needs_tokens

        def make_view(view: str) -> ImageFeatures:
            assert view not in ("adv", "start", "frozen_adv"), "the attack cannot read what it is about to make"
            seen = step.objective.extra_image(image) if view == "extra" else image
            return (step.frozen if view in FROZEN_VIEWS else step.model.image)(seen, tokens)

        ctx = StepContext(
            made.label_B[rows],
            step.model.logit_scale,
            step.text0_CD,
            step.text0_CD,
            step.duplicate_CC,
            make_view,
            0.5,
            step.extra_text_CD,
        )
        attacked = (image + 0.02).clamp(max=1)
        return step.objective.attack_loss(ctx, step.model.encode_image(attacked)).detach()

    loss_B = attack_loss(torch.arange(BATCH))
    assert loss_B.shape == (BATCH,) and loss_B.unique().numel() > 1
    assert torch.allclose(attack_loss(order), loss_B[order], rtol=1e-5, atol=1e-6)
    assert torch.allclose(attack_loss(order[:3]), loss_B[order[:3]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if TECOA_SETTINGS[name] is not None])
def test_with_its_extra_weights_off_it_is_tecoa_to_the_last_bit(tmp_path, name):
    made, tecoa = make(tmp_path / "one", name, TECOA_SETTINGS[name]), make(tmp_path / "other", "tecoa")
    assert made.step.objective.views == {"adv"} and not made.step.objective.tunes_text
    total, _, gradients = made.run()
    tecoa_total, _, tecoa_gradients = tecoa.run()
    assert total == tecoa_total
    assert set(gradients) == set(tecoa_gradients)
    assert all(torch.equal(gradients[n], tecoa_gradients[n]) for n in gradients)


# bf16 keeps 8 significant bits, so an embedding is off by some 0.4 %, times a logit scale of 14 on cosines, and the
# attack's steps are left out (an argument of sign near zero would decide): noise alone perturbs.
BF16_LOSS, BF16_GRADIENT = 0.03, 0.15


@pytest.mark.parametrize("name", NAMES)
def test_bf16_passes_stay_near_fp32(tmp_path, name):
    total, _, gradients = make(tmp_path, name, steps=0).run()
    total16, terms16, gradients16 = make(tmp_path, name, precision="bf16", steps=0).run()
    assert total16 == pytest.approx(total, rel=BF16_LOSS, abs=BF16_LOSS)
    assert relative(gradients16, gradients) < BF16_GRADIENT
    assert all(gradient.dtype == torch.float32 for gradient in gradients16.values())
    assert torch.isfinite(torch.tensor(list(terms16.values()))).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_declared_views_are_those_that_are_read(tmp_path, name, monkeypatch):
    made = make(tmp_path, name)
    read: Counter[str] = Counter()
    make_view = objectives_base.StepContext._view

    def count(ctx: StepContext, view: str) -> ImageFeatures:
        read[view] += 1
        return make_view(ctx, view)

    monkeypatch.setattr(objectives_base.StepContext, "_view", count)
    ctx_calls: list[set[str]] = []
    loss = made.step.objective.loss

    def watch(ctx: StepContext) -> Any:
        read.clear()
        output = loss(ctx)
        ctx_calls.append(set(read))
        return output

    monkeypatch.setattr(made.step.objective, "loss", watch)
    made.run()
    assert ctx_calls == [set(made.step.objective.views)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_encoder_passes_are_those_that_the_cost_says(tmp_path, name, steps):
    made = make(tmp_path, name, steps=steps)
    passes: Counter[str] = Counter()

    def watch(tower: torch.nn.Module, kind: str) -> None:
        first, last = tower.visual.conv1, tower.visual.transformer.resblocks[0]

        def forward(*_: Any) -> None:
            passes[f"{kind} forward"] += 1

        def input_gradient(*_: Any) -> None:
            passes[f"{kind} backward to the input"] += 1

        def backward(module: Any, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(input_gradient)

        last.register_forward_hook(forward)
        last.register_forward_hook(backward)
        if kind == "student":
            first.weight.register_hook(lambda gradient: passes.update([f"{kind} backward to the weights"]))

    watch(made.step.model.image, "student")
    if made.step.frozen is not None:
        watch(made.step.frozen, "frozen")
    text_passes: Counter[str] = Counter()
    made.step.model.open_clip.transformer.register_forward_hook(lambda *_: text_passes.update(["text"]))
    made.run()
    objective = made.step.objective
    trained, attack = len(objective.views & TRAINED_VIEWS), steps if objective.needs_attack else 0
    # Forward passes of the student without a backward pass; the attack's first step makes the view of its start.
    fixed = len(objective.views & ({"clean_fixed"} if steps else {"clean_fixed", "start"}))
    expected = {
        "student forward": attack + trained + fixed,
        "student backward to the input": attack + trained,
        "student backward to the weights": trained and 1,  # autograd adds the views up before the hook sees them
        "frozen forward": len(objective.views & FROZEN_VIEWS),
    }
    assert dict(passes) == {key: count for key, count in expected.items() if count}
    counted = passes["student forward"] + passes["student backward to the input"] + trained + passes["frozen forward"]
    assert counted == objective.cost_units(steps)
    assert not text_passes


def test_an_attack_without_a_step_starts_where_it_ends(tmp_path):
    _, terms, _ = make(tmp_path, "regmix", steps=0).run()  # the divergence of the attack's first and last prediction
    _, stepped, _ = make(tmp_path, "regmix", steps=1).run()
    assert [terms["main"], terms["auxiliary"]] == pytest.approx([0, 0], abs=1e-7)
    assert stepped["main"] > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_what_it_is_and_what_it_costs(name):
    described = entry(name)
    assert "L = " in described.equation and described.title
    assert stated_units(described.cost) == described.units, "say 'PGD-2 takes N', for default settings"


@pytest.mark.parametrize("name", NAMES)
def test_the_attack_leaves_no_gradient_and_no_mark(tmp_path, name):
    made = make(tmp_path, name)
    model = made.step.model
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    stream = torch.get_rng_state()
    made.step(made.image_BCHW, made.label_B, made.seeds, progress=0.5)
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), stream)


# Two processes.

RANKS, RANKS_TIMEOUT_S = 2, 300


def run_as_rank(rank: int, folder: Path) -> None:
    """One rank's half of the batch for every objective; rank 0 keeps the averaged gradients."""
    from datetime import timedelta

    import torch.distributed as dist

    address = (folder / "rendezvous").as_uri()
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=RANKS, timeout=timedelta(seconds=RANKS_TIMEOUT_S)
    )
    share = BATCH // RANKS
    found = {}
    for name in NAMES:
        made = make(folder / str(rank), name, steps=0)
        made.run(slice(rank * share, (rank + 1) * share))
        average_gradients(made.step.parameters)
        found[name] = made.gradients()
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_rank_gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Gradients of every objective, averaged over two gloo processes that share the batch; one start for all."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen([sys.executable, __file__, "rank", str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=RANKS_TIMEOUT_S)
            assert rank.returncode == 0, errors[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    gradients: dict[str, dict[str, Tensor]] = torch.load(folder / "gradients.pt", weights_only=True)
    return gradients


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_gradient_of_the_joined_batch(tmp_path, two_rank_gradients, name):
    # The attack is its random start alone: a sign near zero may turn with the batch size's rounding.
    _, _, joined = make(tmp_path, name, steps=0).run()
    assert relative(two_rank_gradients[name], joined) < 1e-5


# Golden values.

GOLDEN_TOLERANCE = 1e-3  # relative; another machine's matrix products round otherwise, and PGD takes signs of them


def golden_value(folder: Path, name: str) -> dict[str, Any]:
    total, terms, gradients = make(folder, name).run()
    length = float(sum(gradient.double().square().sum() for gradient in gradients.values()) ** 0.5)
    return {"total": total, "terms": terms, "gradient_norm": length}


@pytest.mark.parametrize("name", json.loads(GOLDEN.read_text()))  # of a new objective: the command at this file's end
def test_golden_values_have_not_moved(tmp_path, name):
    value, expected = golden_value(tmp_path, name), json.loads(GOLDEN.read_text())[name]
    assert value["terms"] == pytest.approx(expected["terms"], rel=GOLDEN_TOLERANCE)
    for key in ("total", "gradient_norm"):
        assert value[key] == pytest.approx(expected[key], rel=GOLDEN_TOLERANCE)


def test_golden_values_belong_to_objectives_that_exist():
    assert set(json.loads(GOLDEN.read_text())) <= set(NAMES)


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as folder:
        values = {name: golden_value(Path(folder) / name, name) for name in NAMES}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
    print(f"wrote {len(values)} objectives")


if __name__ == "__main__":
    if sys.argv[1:] == ["golden"]:
        write_golden()
    elif len(sys.argv) == 4 and sys.argv[1] == "rank":
        run_as_rank(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit("usage: python tests/unit/test_objective_free.py golden")
