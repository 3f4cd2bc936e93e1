"""Does TIMA do what it should? Four checks on the embedded model: python -m zsr.recipes.tima_acceptance [key=value ...]

1. With its margins and extra weights at zero it is TeCoA: two short runs, equal to the last bit.
2. Text tuning alone lowers the hyperspherical energy step by step, and keeps the order of class similarities (Spearman
   correlation of the off-diagonal similarities with the original above 0.9).
3. With that text and the untouched image tower, clean zero-shot accuracy on classes never seen drops less than a point.
4. The mean logit margin at growing epsilon, for the untouched model and for TeCoA: what the paper builds its margin on.

Settings are those of a preset; key=value changes them, for instance objective.weight_mhe=1. The exit code is 1 if a check
fails.

Shapes: B images, C classes, K templates, D embedding width.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zsr.attacks.base import input_gradients_only
from zsr.attacks.noise import sample_seeds
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.config import load_config
from zsr.config.schema import OBJECTIVES, RunConfig
from zsr.data.pipeline import Batch, eval_batches
from zsr.data.shards import ShardSet
from zsr.engine.checkpoint import MODEL, load_trained
from zsr.engine.loop import train
from zsr.engine.optim import learning_rate, make_optimizer, set_learning_rate
from zsr.engine.quick_eval import ZeroShotHead, evaluate
from zsr.engine.session import LocalSession
from zsr.engine.step import duplicates
from zsr.models import ImageFeatures, RobustCLIP, TextBank, class_embeddings, load_model
from zsr.objectives.base import StepContext, View, pairs_of_different_classes
from zsr.objectives.text_spread import hyperspherical_energy
from zsr.objectives.tima import TimaConfig

UNSEEN = ("zsr:emoji/val", "zsr:emoji/test_concepts", "zsr:emoji/test_both")
LEVELS = (0, 1, 2, 4, 8)  # of 255
LEAST_SPEARMAN, LARGEST_DROP = 0.9, 0.01


@dataclass(frozen=True)
class Verdict:
    """One check's outcome and the numbers that it rests on."""

    passed: bool
    lines: tuple[str, ...]


# 1. Reduction to TeCoA.


def same_as_tecoa(config: RunConfig, folder: Path) -> Verdict:
    """Train twice as ``config`` says, as TIMA with everything extra off and as TeCoA; compare every byte of the weights."""
    reduced = OBJECTIVES.build(config.objective).tecoa_settings
    weights = {}
    for name, objective in (("tima", {"name": "tima", **reduced}), ("tecoa", {"name": "tecoa"})):
        result = train(_with(config, objective=objective), LocalSession(folder / name))
        weights[name] = (LocalSession(folder / name).saved()[-1] / MODEL).read_bytes()
    equal = weights["tima"] == weights["tecoa"]
    lines = (f"steps={result.steps} weight_bytes={len(weights['tecoa'])} equal={'yes' if equal else 'no'}",)
    return Verdict(equal, lines)


# 2. Text alone.


@dataclass(frozen=True)
class TextRun:
    """A text-only run: the energy before it and after each step, and how well similarities keep their order.

    Attributes:
        least: a bound that no embeddings of so many classes fall below, all of them equally far apart.
    """

    energies: tuple[float, ...]
    least: float
    spearman: float

    @property
    def rises(self) -> int:
        """Steps after which the energy was higher, by more than float32 can be blamed for."""
        return sum(b > a + 1e-6 * abs(a) for a, b in zip(self.energies, self.energies[1:], strict=False))

    @property
    def share(self) -> float:
        """How much of the way down to the bound the run went."""
        return (self.energies[0] - self.energies[-1]) / (self.energies[0] - self.least)

    def verdict(self) -> Verdict:
        some = [self.energies[i * (len(self.energies) - 1) // 8] for i in range(9)]
        lines = (
            f"steps={len(self.energies) - 1} energy={self.energies[0]:.6f}->{self.energies[-1]:.6f} rises={self.rises} "
            f"bound={self.least:.6f} share_of_possible_fall={self.share:.1%}",
            f"energy_at_eighths={' '.join(f'{value:.5f}' for value in some)}",
            f"spearman={self.spearman:.4f} least={LEAST_SPEARMAN}",
        )
        fell = self.rises == 0 and self.energies[-1] < self.energies[0]
        return Verdict(fell and self.spearman > LEAST_SPEARMAN, lines)


def tune_text(config: RunConfig, model: RobustCLIP, features_CKE: Tensor, bank_ND: Tensor, steps: int) -> TextRun:
    """Minimise the objective's text terms over the model's text projection; images stay as they are.

    The objective and the optimizer are the run's own. Only the image side's weights are zero, and each batch of frozen
    image embeddings comes from ``bank_ND``.
    """
    objective = OBJECTIVES.build(config.objective.model_copy(update={"weight_tam": 0.0, "weight_takd": 0.0}))
    projection = model.text_projection
    projection.requires_grad_(True)
    text0_CD = class_embeddings(features_CKE, projection.detach())
    duplicate_CC = duplicates(text0_CD)
    pairs_CC = pairs_of_different_classes(duplicate_CC)

    def energy() -> float:
        text_CD = class_embeddings(features_CKE, projection.detach())
        return hyperspherical_energy(text_CD, pairs_CC, objective.config.mhe_form, objective.config.mhe_power).item()

    optimizer = make_optimizer(config.optim, [projection])
    energies = [energy()]
    for step, rows in zip(range(steps), _rows(len(bank_ND), config.train.batch_size, config.seed), strict=False):

        def frozen(view: View, rows: Tensor = rows) -> ImageFeatures:
            return ImageFeatures(bank_ND[rows], bank_ND[rows])

        ctx = StepContext(
            label_B=torch.zeros(len(rows), dtype=torch.int64),  # read by the image terms alone, which weigh nothing
            scale=model.logit_scale,
            text_CD=class_embeddings(features_CKE, projection),
            text0_CD=text0_CD,
            duplicate_CC=duplicate_CC,
            make_view=frozen,
        )
        set_learning_rate(optimizer, learning_rate(config.optim, step, steps))
        optimizer.zero_grad(set_to_none=True)
        objective.loss(ctx).total.backward()
        optimizer.step()
        energies.append(energy())
    projection.requires_grad_(False)
    text_CD = class_embeddings(features_CKE, projection)
    similar = [(text @ text.T)[pairs_CC] for text in (text0_CD, text_CD)]
    return TextRun(tuple(energies), _energy_of_equally_spread(len(text_CD), objective.config), spearman(*similar))


def _energy_of_equally_spread(num_classes: int, config: TimaConfig) -> float:
    """The energy of a regular simplex: its edge is the root mean square distance that no set of points exceeds."""
    squared = 2 * num_classes / (num_classes - 1)
    if config.mhe_form == "bounded":
        return float(1 / (1 + squared ** (config.mhe_power / 2)))
    return float(-math.log(squared) / 2 if config.mhe_power == 0 else squared ** (-config.mhe_power / 2))


def _rows(num: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num, generator=generator).split(batch_size)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; ties are broken by place."""
    ranks = torch.stack([a, b]).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def encode_set(model: RobustCLIP, shards: ShardSet) -> Tensor:
    """Unit embeddings ``[N, D]`` of all clean images of a set."""
    with torch.no_grad():
        return torch.cat([model.encode_image(_pixels(batch)).embed_BD for batch in _batches(model, shards)])


def _batches(model: RobustCLIP, shards: ShardSet, num_samples: int = 0) -> Iterator[Batch]:
    return eval_batches(shards, image_size=model.image_size, batch_size=128, num_samples=num_samples)


def _pixels(batch: Batch) -> Tensor:
    return batch.image.float() / 255


# 3. Classes never seen.


def clean_accuracy(model: RobustCLIP, bank: TextBank, shards: ShardSet) -> float:
    return evaluate(ZeroShotHead(model, bank, shards.classes, shards.templates[:1]), shards).clean_acc


def accuracy_kept(before: dict[str, float], after: dict[str, float]) -> Verdict:
    """Compare clean accuracies by set."""
    lines = tuple(f"set={name} clean={before[name]:.4f}->{after[name]:.4f}" for name in before)
    drops = {name: before[name] - after[name] for name in before}
    worst = max(drops, key=lambda name: drops[name])
    lines = (*lines, f"largest_drop={drops[worst]:+.4f} set={worst} allowed={LARGEST_DROP}")
    return Verdict(drops[worst] < LARGEST_DROP, lines)


# 4. Margins.


def margins_by_level(model: RobustCLIP, bank: TextBank, shards: ShardSet, num_samples: int, seed: int) -> Tensor:
    """Margins ``[levels, N]``: the true class's logit less the best other one's, under PGD-10 at each level."""
    head = ZeroShotHead(model, bank, shards.classes, shards.templates[:1])
    margins: list[list[Tensor]] = [[] for _ in LEVELS]
    for batch in _batches(model, shards, num_samples):
        image_BCHW, label_B = _pixels(batch), batch.label

        def loss(attacked_BCHW: Tensor, label_B: Tensor = label_B) -> Tensor:
            return F.cross_entropy(head(attacked_BCHW), label_B, reduction="none")

        for level, found in zip(LEVELS, margins, strict=True):
            attack = PGD(PGDConfig(eps=level / 255, step_size=level / 255 / 4, steps=10))
            with input_gradients_only(model.image):
                attacked = attack.perturb(loss, image_BCHW, sample_seeds(batch.key, "margin", seed)).image_BCHW
            with torch.no_grad():
                found.append(margin(head(attacked), label_B))
    return torch.stack([torch.cat(parts) for parts in margins])


def margin(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """The true class's logit less the best other one's, ``[B]``."""
    own = F.one_hot(label_B, logits_BC.shape[1]).bool()
    return logits_BC[own] - logits_BC.masked_fill(own, -torch.inf).amax(1)


def margin_table(margins: dict[str, Tensor]) -> Verdict:
    """Means by level and model; passes if every model's margins fall as epsilon grows."""
    lines = ["model            " + "".join(f"{f'eps={level}/255':>12}" for level in LEVELS)]
    for name, margin_LN in margins.items():
        means = margin_LN.mean(1)
        # How alike the offsets of samples are: their spread in units of the margins' own spread at 1/255.
        offset_LN = margin_LN[1:] - margin_LN[1]
        spread = offset_LN.std(1) / margin_LN[1].std()
        same = [torch.corrcoef(torch.stack([margin_LN[1], row]))[0, 1].item() for row in margin_LN[1:]]
        lines.append(f"{name:<17}" + "".join(f"{value:12.3f}" for value in means.tolist()))
        lines.append(f"{'  offset to 1/255':<29}" + "".join(f"{value:12.3f}" for value in offset_LN.mean(1).tolist()))
        lines.append(f"{'  its spread':<29}" + "".join(f"{value:12.3f}" for value in spread.tolist()))
        lines.append(f"{'  correlation':<29}" + "".join(f"{value:12.3f}" for value in same))
    fall = all(bool((margin_LN.mean(1).diff() < 0).all()) for margin_LN in margins.values())
    return Verdict(fall, tuple(lines))


# All of it.


def run(config: RunConfig, checks: Sequence[int], quick: bool) -> Iterator[tuple[str, Verdict]]:
    """The checks asked for, in order, each as it is done."""
    short = {**config.train.model_dump(), "batch_size": 64, "max_steps": 4 if quick else 10}
    if 1 in checks:
        with tempfile.TemporaryDirectory() as folder:
            verdict = same_as_tecoa(_with(config, train=short, eval=_little(config)), Path(folder))
        yield "1 tima without its extras is tecoa, bit for bit", verdict
    if 2 in checks or 3 in checks:
        yield from _text_checks(config, 40 if quick else 200)
    if 4 in checks:
        tecoa = _with(config, objective={"name": "tecoa"}, eval=_little(config), **({"train": short} if quick else {}))
        yield "4 mean logit margin falls with epsilon", _margin_check(tecoa, 64 if quick else 0)


def _text_checks(config: RunConfig, steps: int) -> Iterator[tuple[str, Verdict]]:
    model = load_model(config.model).eval()
    bank = TextBank(model)
    train_set, unseen = ShardSet(config.data.train), {address: ShardSet(address) for address in UNSEEN}
    before = {name: clean_accuracy(model, bank, shards) for name, shards in unseen.items()}
    features_CKE = bank.features(train_set.classes, train_set.templates[:1])
    text_run = tune_text(config, model, features_CKE, encode_set(model, train_set), steps)
    yield "2 text tuning lowers the energy and keeps the order of similarities", text_run.verdict()
    after = {name: clean_accuracy(model, bank, shards) for name, shards in unseen.items()}
    yield "3 tuned text keeps clean accuracy on unseen classes", accuracy_kept(before, after)


def _margin_check(tecoa: RunConfig, num_samples: int) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        train(tecoa, LocalSession(Path(folder)))
        tuned, _ = load_trained(LocalSession(Path(folder)).saved()[-1])
    models = {"untouched": load_model(tecoa.model), "tecoa": tuned}
    val_set = ShardSet(tecoa.data.val)
    return margin_table(
        {
            name: margins_by_level(model.eval(), TextBank(model), val_set, num_samples, tecoa.seed)
            for name, model in models.items()
        }
    )


def _little(config: RunConfig) -> dict[str, object]:
    """An evaluation inside training that costs next to nothing: nobody reads it here."""
    return {**config.eval.model_dump(), "num_samples": 8}


def _with(config: RunConfig, **groups: object) -> RunConfig:
    return RunConfig.model_validate({**config.model_dump(), **groups})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="TIMA's acceptance checks.")
    parser.add_argument("--model", default="zsr:emoji-vit", help="as model.name (default: %(default)s)")
    parser.add_argument("--preset", default="demo", help="settings of the runs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer steps and samples: does it run at all?")
    parser.add_argument("--checks", nargs="+", type=int, default=[1, 2, 3, 4], metavar="N", help="2 brings 3 with it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as objective.weight_mhe=1")
    asked = parser.parse_args(arguments)
    config = load_config(
        asked.preset,
        [f"model.name={asked.model}", "objective.name=tima", "launch.workers=1", *asked.overrides],
    )
    torch.set_num_threads(max(1, config.train.num_threads))
    weights = {key: value for key, value in config.objective.model_dump().items() if key != "name"}
    print("settings " + " ".join(f"{key}={value}" for key, value in weights.items()))
    print(
        f"optimizer={config.optim.name} lr={config.optim.lr:g} batch_size={config.train.batch_size} seed={config.seed}"
    )
    failed = 0
    began = time.monotonic()
    for title, verdict in run(config, asked.checks, asked.quick):
        print(f"\n{'PASS' if verdict.passed else 'FAIL'}  {title}  ({time.monotonic() - began:.0f} s)")
        for line in verdict.lines:
            print(f"  {line}")
        sys.stdout.flush()
        failed += not verdict.passed
        began = time.monotonic()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
