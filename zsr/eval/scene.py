"""One model on one set: what becomes of a batch, clean or attacked. The only code that workers run.

Verdicts are in float32. A target in bfloat16 is attacked in bfloat16: what that finds is looked at in float32, and a sample
that was given up too early, for an image that float32 has right, is attacked again in float32.

Shapes: B images, C channels (or classes, in logits), H x W pixels. Pixels are in [0, 1].
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zsr.attacks.base import Attack, AttackResult, input_gradients_only
from zsr.attacks.checks import Facts, Finding, boundary_finding, count_finding, gravest_first, losses_of
from zsr.attacks.checks import judge as judge_facts
from zsr.attacks.noise import sample_seeds
from zsr.data.pipeline import Batch
from zsr.eval.images import Images
from zsr.eval.ledger import Line
from zsr.eval.target import Target
from zsr.models import ImageTower, in_precision


@dataclass(frozen=True)
class Request:
    """A batch to do.

    Attributes:
        judges: who classifies, by name.
        attack: what the images go through first; None for none.
        last: whether no stage follows, so that what survives has survived all.
        blind: samples whose gradient was all zero in an earlier stage.
        right: samples that a judge has right without the attack, by its name.
        keep: samples whose attacked images are wanted.
    """

    stage: int
    ids: Sequence[int]
    judges: Sequence[str]
    attack: Attack[Any] | None = None
    last: bool = True
    blind: frozenset[int] = frozenset()
    right: Mapping[str, frozenset[int]] = field(default_factory=dict)
    keep: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Answer:
    """A batch done: its line, and the images that were asked for, float32 ``[C, H, W]`` by sample."""

    line: Line
    kept: dict[int, np.ndarray] = field(default_factory=dict)


class Scene:
    """A target in front of a set's images.

    Args:
        class_names: of the judges' columns.
        device: where the models are.
        seed: of the attack's random numbers; with a sample's key it fixes them.
        chance_level: whether the set is known as one where a constant answer scores like a robust model.
        differences: of the set from what the registry knows of its counts, in sentences; None where it knows nothing.
    """

    def __init__(
        self,
        images: Images,
        target: Target,
        class_names: Sequence[str],
        *,
        device: str | torch.device,
        seed: int = 0,
        chance_level: bool = False,
        differences: Sequence[str] | None = None,
    ) -> None:
        self.images, self.target, self.class_names = images, target, list(class_names)
        self.device, self.seed, self.chance_level = torch.device(device), seed, chance_level
        self.differences = differences

    def facts(self, attack: Attack[Any] | None, lines: Iterable[Line], judge: str) -> Facts:
        """What these batches showed of a judge."""
        of_attack: dict[str, Any] = {}
        if attack is not None:
            of_attack = {"eps": attack.config.eps, "norm": attack.config.norm, "losses": losses_of(attack)}
        facts = Facts(self.class_names, chance_level=self.chance_level, **of_attack)
        total = torch.zeros_like(facts.sums)
        for line in lines:
            for place, number in line.facts.get(judge, {}).items():
                total[int(place)] += number
        facts.add(total)
        return facts

    def findings(self, attack: Attack[Any] | None, lines: Iterable[Line], judge: str) -> list[Finding]:
        """What the checks that need no passes of their own say of a judge, the gravest first."""
        found, target = judge_facts(self.facts(attack, lines, judge)), self.target
        if self.differences is not None:
            found.append(count_finding(self.differences))
        if attack is not None and (target.knowledge[judge] == "oblivious" or target.crafted_on != "served"):
            found.append(boundary_finding(attack.config.name, any(part.config.stops_early for part in attack.parts)))
        return gravest_first(found)

    def do(self, request: Request, batch: Batch | None = None) -> Answer:
        """Classify a batch, after an attack if one is asked for. What a sample gives does not depend on the others.

        Args:
            batch: of the request's samples, if it has been read already.

        Raises:
            ValueError, OSError: a sample cannot be read.
        """
        began = time.perf_counter()
        if batch is None:
            batch = self.images.batch(request.ids)
        image_BCHW, label_B = batch.image.to(self.device).float() / 255, batch.label.to(self.device)
        with self.still(), count_passes(self.target.towers) as passes:
            found = None
            judged_BCHW, redone = image_BCHW, 0
            if request.attack is not None:
                seeds = sample_seeds(batch.key, "eval", self.seed)
                found, redone = self.attack(request.attack, image_BCHW, label_B, seeds)
                judged_BCHW = found.image_BCHW
            with in_precision("fp32", self.target.towers):
                logits = {name: self._judge(name, judged_BCHW, batch.key) for name in request.judges}
            # On the host before the clock is read: an accelerator has work left when it is asked for no result.
            pred = {name: logits_BC.argmax(-1).tolist() for name, logits_BC in logits.items()}
            seconds, units = time.perf_counter() - began, passes[0]
        line = Line(
            stage=request.stage,
            ids=list(request.ids),
            pred=pred,
            passes=units,
            seconds=round(seconds, 4),
            redone=redone,
            facts=self._facts_of(request, found, image_BCHW, label_B, logits),
            **({} if found is None else _about(found)),
        )
        kept = {
            sample: judged_BCHW[row].cpu().numpy() for row, sample in enumerate(request.ids) if sample in request.keep
        }
        return Answer(line, kept)

    def attack(
        self, attack: Attack[Any], image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> tuple[AttackResult, int]:
        """Attack a batch in the target's precision, and what that gave up too early again in float32. Call in :meth:`still`.

        Returns:
            What was found, with successes that float32 shares, and how many samples were attacked again.
        """
        found, towers = self.target.attack(attack, image_BCHW, label_B, seeds), self.target.towers
        if found.success_B is None or self.target.seen.head.model.image.precision == "fp32":
            return found, 0
        if (
            self.target.surrogate is not None
        ):  # its success is over the defence, of which the classifier seen says nothing
            return found, 0
        with in_precision("fp32", towers), torch.no_grad():
            wrong_B = self.target.fooled(found.image_BCHW, label_B)
        again = (found.success_B & ~wrong_B).nonzero().flatten()
        images_BCHW, zero_grad_B = found.image_BCHW.clone(), found.zero_grad_B.clone()
        if len(again):
            with in_precision("fp32", towers):
                own_seeds = [seeds[row] for row in again.tolist()]
                anew = self.target.attack(attack, image_BCHW[again], label_B[again], own_seeds)
            images_BCHW[again], wrong_B[again] = anew.image_BCHW, _given(anew.success_B)
            zero_grad_B[again] |= anew.zero_grad_B
        return AttackResult(images_BCHW, zero_grad_B, wrong_B), len(again)

    def _facts_of(
        self,
        request: Request,
        found: AttackResult | None,
        image_BCHW: Tensor,
        label_B: Tensor,
        logits: Mapping[str, Tensor],
    ) -> dict[str, dict[str, int]]:
        """What the cheap checks see, by judge. A sample's last stage counts, so that each sample counts once."""
        seen = {}
        for name, logits_BC in logits.items():
            facts = self.facts(request.attack, (), name)
            if found is None:
                facts.see_clean(logits_BC, label_B)
            else:
                over = request.last or found.success_B is None
                done_B = torch.full_like(found.zero_grad_B, over) if over else _given(found.success_B)
                done_B = done_B & self._marks(request, request.right.get(name, ()))
                blind_B = found.zero_grad_B | self._marks(request, request.blind)
                facts.see_attacked(
                    image_BCHW[done_B], found.image_BCHW[done_B], logits_BC[done_B], blind_B[done_B], label_B[done_B]
                )
            sums = facts.sums.tolist()
            seen[name] = {str(place): int(sum_) for place, sum_ in enumerate(sums) if sum_}
        return seen

    def _marks(self, request: Request, samples: Collection[int]) -> Tensor:
        """bool [B]: which of the batch are among these samples."""
        return torch.tensor([sample in samples for sample in request.ids], dtype=torch.bool, device=self.device)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Eval mode, no gradients of weights, and the same random columns for every batch of a model that hides some."""
        with ExitStack() as stack:
            stack.enter_context(input_gradients_only(*self.target.towers))
            for tower in self.target.towers:
                stack.enter_context(tower.hiding_columns(self.seed))
            yield

    @torch.no_grad()
    def _judge(self, name: str, image_BCHW: Tensor, keys: Sequence[str]) -> Tensor:
        return self.target.judges[name](image_BCHW, keys)


def _given(success_B: Tensor | None) -> Tensor:
    assert success_B is not None
    return success_B


def _about(found: AttackResult) -> dict[str, Any]:
    """Of an attack: whether it is done with each sample, and whether it was blind there."""
    success_B = torch.zeros_like(found.zero_grad_B) if found.success_B is None else found.success_B
    return {"success": success_B.tolist(), "zero_grad": found.zero_grad_B.tolist()}


@contextmanager
def count_passes(towers: Sequence[ImageTower]) -> Iterator[list[int]]:
    """Count the images that go through these towers, in a list of one number: once forward, once more for a gradient."""
    passes = [0]

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        with_gradient = torch.is_grad_enabled() and args[0].requires_grad
        passes[0] += len(args[0]) * (2 if with_gradient else 1)

    hooks = [tower.register_forward_pre_hook(count) for tower in towers]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
