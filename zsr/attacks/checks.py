"""Named checks that a robust number has to pass: what a measurement saw, summed up as it goes, and what that says.

Shapes: B images, C classes, H x W pixels. Each check has an id, a sentence in :data:`CHECKS` and a section in docs/attacks.md.
The checks in this module cost a few reductions over tensors that the measurement has anyway; those that need passes of their
own are in zsr/eval/probes.py. Sources: METHODS.md (b); Croce & Hein's flags.md in auto-attack for the idea of named flags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from zsr.attacks.losses import needs_more_classes
from zsr.attacks.threat import Norm, ThreatModel
from zsr.config.base import Config

Level = Literal["ok", "note", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warn", "fail")
"""From harmless to grave; a level's index is its number in metrics."""

CHECKS = {
    "zero-gradients": "Attacked images without an input gradient: the attack could not see where to go.",
    "lost-temperature": "Logits without the model's scale: cross-entropy and softmax attacks lose their aim.",
    "probabilities": "Probabilities where logits belong: their gradient vanishes where the model is sure.",
    "epsilon-exceeded": "Attacked images outside the epsilon ball, measured again from the pixels.",
    "pixel-range": "Images with pixels outside [0, 1].",
    "not-finite": "NaN or infinity in logits or attacked images.",
    "label-range": "Labels that name no class.",
    "duplicate-class-names": "Classes of the same name: a zero-shot classifier cannot tell them apart.",
    "chance-level": "A robust number that one constant answer would reach too.",
    "few-classes": "Too few classes for the DLR losses: their attacks step aside.",
    "batch-size": "Verdicts or gradients that change with the batch: the sign of an attack that underflows.",
    "black-box": "Images that a search without gradients breaks and the attack does not: a masked gradient.",
    "weak-beats-strong": "Images that a weak attack breaks and the strong one does not.",
    "loss-not-rising": "Images whose loss an ascent does not raise.",
    "randomised": "A model that answers the same image in different ways.",
    "bf16-verdicts": "Samples that withstand an attack in bfloat16 and not the same attack in float32.",
    "not-probed": "A card for whose classifier some or all probes were left out.",
    "stops-early": "An attack that stops at the boundary of another head than the one that judges.",
    "unexpected-count": "A set of the registry with other numbers of samples or classes than it should have.",
}
"""What each check looks for."""
PROBES = ("batch-size", "black-box", "weak-beats-strong", "loss-not-rising", "randomised")
"""Those that need passes of their own (zsr/eval/probes.py)."""

ZERO_GRAD_LIMIT = 0.05
"""Share of attacked images without input gradient above which a robust accuracy is not believed."""
MIN_RANGE = 2.0
"""Logits of clean images span more than this; cosines cannot (METHODS.md (b) 2)."""
CONSTANT_SHARE = 0.99
"""Share of one class among the answers from which they count as one constant answer."""
ENOUGH_IMAGES = 20
"""Below so many attacked images, a constant answer is no rival: equal answers prove nothing, and a few classes are all."""
_ROUNDING = 1e-6  # of one pixel, in fp32: image + (attacked - image) is rounded twice

_COUNTS = (
    "seen", "bad_labels", "bad_logits", "narrow", "bare_cosines", "probabilities",
    "attacked", "blind", "outside_ball", "outside_range", "bad_attacked", "labelled", "standing",
)  # fmt: skip


class Finding(Config):
    """What one named check saw (docs/attacks.md explains each id)."""

    id: Annotated[str, Field(pattern="^[a-z0-9-]+$")]
    level: Level
    """ok: found nothing; note: a reader should know; warn: doubtful; fail: the robust number is not to be believed."""
    sentence: str
    value: float | None = None
    """The number that the check compared, if it has one."""


@dataclass
class Facts:
    """What a measurement saw, as sums: they stay on the device until :func:`judge` and add up over batches and ranks.

    Attributes:
        class_names: of the classifier's columns.
        eps, norm: of the threat model; None for eps leaves out the check of the ball.
        expects_logits: whether probabilities would be a mistake.
        chance_level: the set is known as one where a constant answer scores like a robust model.
        losses: of the attack's stages, by their names (:func:`losses_of`); None where nothing is attacked.
        sums: whole numbers; hand another measurement's to :meth:`add` (a rank's, or a finished part's from a file).
    """

    class_names: Sequence[str]
    eps: float | None = None
    norm: Norm = "linf"
    expects_logits: bool = True
    chance_level: bool = False
    losses: Mapping[str, str] | None = None
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(_COUNTS) + 2 * len(self.class_names), dtype=torch.long)

    def add(self, sums: Tensor | Sequence[int]) -> None:
        """Count in what another measurement with these classes saw."""
        self.sums = self.sums + torch.as_tensor(sums, dtype=torch.long, device=self.sums.device)

    def see_clean(self, logits_BC: Tensor, label_B: Tensor) -> None:
        """Count in a batch of images as they are."""
        logits_BC = logits_BC.detach().float()
        finite_B = logits_BC.isfinite().all(1)
        low_B, high_B = logits_BC.amin(1), logits_BC.amax(1)
        # As loose as bfloat16 adds up.
        probable_B = (low_B >= 0) & (high_B <= 1.001) & ((logits_BC.sum(1) - 1).abs() < 5e-3)
        self._count(
            seen=torch.ones_like(finite_B),
            bad_labels=(label_B < 0) | (label_B >= len(self.class_names)),
            bad_logits=~finite_B,
            narrow=finite_B & (high_B - low_B <= MIN_RANGE) & ~probable_B,
            bare_cosines=finite_B & (low_B >= -1.001) & (high_B <= 1.001) & ~probable_B,
            probabilities=probable_B,
        )

    def see_attacked(
        self,
        clean_BCHW: Tensor,
        attacked_BCHW: Tensor,
        logits_BC: Tensor,
        zero_grad_B: Tensor,
        label_B: Tensor | None = None,
    ) -> None:
        """Count in a batch of images after the attack.

        Args:
            logits_BC: of the attacked images.
            zero_grad_B: bool, from the attack.
            label_B: true classes; without them chance-level rests on what is known of the set.
        """
        clean_BCHW, attacked_BCHW = clean_BCHW.detach().float(), attacked_BCHW.detach().float()
        flat_BP = attacked_BCHW.flatten(1)
        self._count(
            attacked=torch.ones_like(zero_grad_B),
            blind=zero_grad_B,
            outside_range=((flat_BP < 0) | (flat_BP > 1)).any(1),
            bad_attacked=~(flat_BP.isfinite().all(1) & logits_BC.isfinite().all(1)),
        )
        if self.eps is not None:
            size_B = ThreatModel(self.norm, self.eps).size(attacked_BCHW - clean_BCHW)
            self._count(outside_ball=size_B > self.eps + tolerance(self.norm, self.eps, flat_BP.shape[1]))
        if label_B is not None:
            answer_B, valid_B = logits_BC.argmax(1), (label_B >= 0) & (label_B < len(self.class_names))
            self._count(labelled=valid_B, standing=valid_B & (answer_B == label_B))
            for place, class_B in enumerate((answer_B, label_B.clamp(0, len(self.class_names) - 1))):
                offset = len(_COUNTS) + place * len(self.class_names)
                self.sums.index_add_(0, offset + class_B, valid_B.long())

    def _count(self, **rows: Tensor) -> None:
        device = next(iter(rows.values())).device
        if self.sums.device != device:
            self.sums = self.sums.to(device)
        for name, rows_B in rows.items():
            self.sums[_COUNTS.index(name)] += rows_B.sum()


def tolerance(norm: Norm, eps: float, num_values: int) -> float:
    """By how much fp32 rounding may exceed epsilon: 1e-6 for one value; for L2 the length of such errors in all of them."""
    return _ROUNDING if norm == "linf" else 0.1 * _ROUNDING * num_values**0.5 + 1e-5 * eps


def losses_of(attack: Any) -> dict[str, str]:
    """The loss that each stage of an attack maximises, by the stage's name; empty for stages without a choice of losses."""
    names = attack.stages or (attack.config.name,)
    return {name: getattr(part.config, "loss", "") for name, part in zip(names, attack.parts, strict=True)}


class _Seen(NamedTuple):
    """The sums, on the host."""

    facts: Facts
    counts: dict[str, int]
    answers: list[int]
    labels: list[int]


def judge(facts: Facts) -> list[Finding]:
    """What the facts say: a finding for each cheap check that applies, the gravest first."""
    sums, start, num = facts.sums.tolist(), len(_COUNTS), len(facts.class_names)
    seen = _Seen(facts, dict(zip(_COUNTS, sums)), sums[start : start + num], sums[start + num :])
    return gravest_first(finding for check in _JUDGES for finding in check(seen))


def gravest_first(findings: Iterator[Finding] | Sequence[Finding]) -> list[Finding]:
    """By level, then by id."""
    return sorted(findings, key=lambda finding: (-LEVELS.index(finding.level), finding.id))


def share_finding(check: str, count: int, total: int, what: str, *, fail: float = 0.0, warn: float = 0.0) -> Finding:
    """A finding about ``count`` of ``total``: at fault where the share is above ``fail``, doubtful above ``warn``."""
    share = count / total
    level: Level = "fail" if share > fail else "warn" if share > warn else "ok"
    sentence = f"{count} of {total} {what}" if count else f"none of {total} {what}"
    return Finding(id=check, level=level, sentence=sentence, value=share)


FLATTERS = (
    "stops where the head that it sees errs, which is not the head that judges, so its number flatters; "
    "compare under pgd or cw"
)


def boundary_finding(name: str, stops_early: bool) -> Finding:
    """Of an attack that sees another head than the one that judges: whether it goes on past that head's boundary."""
    if stops_early:
        return Finding(id="stops-early", level="warn", sentence=f"{name} {FLATTERS}")
    return Finding(id="stops-early", level="ok", sentence=f"{name} goes on where the head that it sees errs")


def count_finding(differences: Sequence[str]) -> Finding:
    """Of a set whose counts the registry knows.

    Args:
        differences: a sentence for each count that is not the expected one, of the whole set and not of a subset.
    """
    if differences:
        return Finding(
            id="unexpected-count", level="warn", sentence="; ".join(differences), value=float(len(differences))
        )
    sentence = "the set has as many samples and classes as the registry knows it to have"
    return Finding(id="unexpected-count", level="ok", sentence=sentence, value=0.0)


def metrics_of(findings: Sequence[Finding]) -> dict[str, float]:
    """``val/check/<id>`` for the tracker: 0 ok, 1 note, 2 warn, 3 fail."""
    return {f"val/check/{finding.id}": float(LEVELS.index(finding.level)) for finding in findings}


def _of_clean(seen: _Seen) -> Iterator[Finding]:
    count, total = seen.counts, seen.counts["seen"]
    if not total:
        return
    num = len(seen.facts.class_names)
    yield share_finding("label-range", count["bad_labels"], total, f"labels lie outside 0..{num - 1}")
    if not seen.facts.expects_logits:
        return
    yield share_finding(
        "probabilities", count["probabilities"], total, "clean images get numbers in [0, 1] that sum to 1", fail=0.5, warn=0.5
    )  # fmt: skip
    narrow, bare = count["narrow"], count["bare_cosines"]
    level: Level = "ok" if 2 * narrow <= total else "fail" if 2 * bare > total else "warn"
    sentence = f"the logits of {narrow} of {total} clean images span at most {MIN_RANGE:g}"
    if level != "ok":
        sentence += (
            ", and lie in [-1, 1] as bare cosines do" if level == "fail" else ", though they are no bare cosines"
        )
    yield Finding(id="lost-temperature", level=level, sentence=sentence, value=narrow / total)


def _of_attacked(seen: _Seen) -> Iterator[Finding]:
    count, total, facts = seen.counts, seen.counts["attacked"], seen.facts
    if total:
        what = f"attacked images had no input gradient at some step (limit {ZERO_GRAD_LIMIT:.0%})"
        yield share_finding("zero-gradients", count["blind"], total, what, fail=ZERO_GRAD_LIMIT)
        yield share_finding("pixel-range", count["outside_range"], total, "attacked images leave [0, 1]")
        if facts.eps is not None:
            what = f"attacked images are further than eps={facts.eps:.6g} ({facts.norm}) from the clean ones"
            yield share_finding("epsilon-exceeded", count["outside_ball"], total, f"{what}, beyond rounding")


def _of_numbers(seen: _Seen) -> Iterator[Finding]:
    total = seen.counts["seen"] + seen.counts["attacked"]
    if total:
        bad = seen.counts["bad_logits"] + seen.counts["bad_attacked"]
        yield share_finding("not-finite", bad, total, "clean and attacked images give or hold NaN or infinity")


def _of_names(seen: _Seen) -> Iterator[Finding]:
    names = Counter(" ".join(name.replace("_", " ").lower().split()) for name in seen.facts.class_names)
    twins = sorted(name for name, times in names.items() if times > 1)
    extra, num = sum(names.values()) - len(names), len(seen.facts.class_names)
    level: Level = "ok" if not twins else "warn" if 10 * extra > num else "note"
    sentence = f"{extra} of {num} class names are another's" + (f": {', '.join(twins[:5])}" if twins else "")
    yield Finding(id="duplicate-class-names", level=level, sentence=sentence, value=float(extra))


def _of_classes(seen: _Seen) -> Iterator[Finding]:
    num, losses = len(seen.facts.class_names), seen.facts.losses
    if losses is None:
        aside = {1: "apgd-dlr and apgd-t step", 2: "apgd-dlr and apgd-t step", 3: "apgd-t steps"}.get(num)
        level: Level = "note" if aside else "ok"
        sentence = f"{num} classes: {aside} aside" if aside else f"{num} classes are enough for every loss"
    else:
        idle = [stage for stage, loss in losses.items() if needs_more_classes(loss, num)]
        level = "ok" if not idle else "fail" if len(idle) == len(losses) else "warn"
        sentence = f"{num} classes are enough for the attack's losses"
        if idle:
            sentence = f"{num} classes: {len(idle)} of {len(losses)} stages stepped aside ({', '.join(idle)})"
        if level == "fail":
            sentence += ", so nothing was attacked"
    yield Finding(id="few-classes", level=level, sentence=sentence, value=float(num))


def _of_chance(seen: _Seen) -> Iterator[Finding]:
    total, standing = seen.counts["labelled"], seen.counts["standing"]
    known = "; the set is known for it" if seen.facts.chance_level else ""
    if not total:
        if known:
            sentence = "a constant answer scores like a robust model on this set"
            yield Finding(id="chance-level", level="note", sentence=sentence)
        return
    # Attacked images are those that were right, so a constant answer keeps the images of its class and loses all others.
    favourite = max(range(len(seen.answers)), key=lambda c: seen.answers[c])
    constant = seen.labels[favourite]
    name, answers = seen.facts.class_names[favourite], seen.answers[favourite]
    level: Level = "note" if known else "ok"
    sentence = (
        f"{standing} of {total} attacked images stay right, and always saying {name!r} would keep {constant}{known}"
    )
    if 0 < standing <= constant and total >= ENOUGH_IMAGES:
        same = answers >= CONSTANT_SHARE * total
        level = "fail" if same else "warn"
        sentence += f"; {answers} of the answers are that"
    yield Finding(id="chance-level", level=level, sentence=sentence, value=standing / total)


_JUDGES: tuple[Callable[[_Seen], Iterator[Finding]], ...] = (
    _of_clean, _of_attacked, _of_numbers, _of_names, _of_classes, _of_chance,
)  # fmt: skip
