"""Checks that need passes of their own, on a few images of a measurement: is its attack as strong as it looks?

Shapes: B images, C classes, H x W pixels; P values of an image.

Cost for a sample, in units (one forward pass of the image encoder), all probes together: 27, and 206 more for one that the main
attack left standing; the first eight take 2 and two brief runs of the main attack more (44 with PGD). Sources:
METHODS.md 0.3 and (b) 1; Carlini et al., arXiv 1902.06705, section 5 (a sound attack beats a weaker one and a blind one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsr.attacks.autoattack import AutoAttack
from zsr.attacks.base import Attack, Logits
from zsr.attacks.checks import MIN_RANGE, Facts, Finding, Level, gravest_first, share_finding
from zsr.attacks.losses import margin
from zsr.attacks.noise import derived_seeds, sample_seeds
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.attacks.square import Square, SquareConfig

MOST_IMAGES = 32
QUERIES = 200
"""Of the black-box search; a model that masks its gradient falls within a few dozen."""
_FEWEST_BROKEN = 8  # of the images probed, if there are so many: some verdicts should be able to turn the other way
_ALONE = 8  # samples looked at one by one
_WEAK_STEPS = 10
_BRIEF_STEPS = 10
_MEAN_OF = (
    512  # the batch whose mean loss makes fp16 gradients vanish (METHODS.md 0.3); a power of two, so exact in fp32
)
_FEWEST = 3  # images below which a share may be an accident
_SEARCH = f"{QUERIES} queries of Square"
_NONE_LEFT = "the attack left no image standing"
_MANY = (
    0.1  # share of the images left standing that a weaker attack breaks, above which the main one is not to be believed
)


class Sample:
    """A few of the images that a measurement attacked, gathered while it runs (``watch`` of ``quick_eval.evaluate``)."""

    def __init__(self) -> None:
        self._kept: dict[bool, list[tuple[Tensor, Tensor, str]]] = {False: [], True: []}

    def see(self, image_BCHW: Tensor, label_B: Tensor, keys: Sequence[str], broken_B: Tensor) -> None:
        """Keep what is still wanted of a batch."""
        for broken, kept in self._kept.items():
            rows = (broken_B == broken).nonzero().flatten().tolist()
            both = [*kept, *((image_BCHW[row].clone(), label_B[row], keys[row]) for row in rows)]
            kept[:] = [both[row] for row in drawn([key for *_, key in both])[:MOST_IMAGES]]

    def take(self) -> tuple[Tensor, Tensor, list[str], Tensor] | None:
        """Images, labels, keys and verdicts (bool, broken) of those to probe; None if nothing was attacked."""
        kept = [*self._kept[False], *self._kept[True]]
        if not kept:
            return None
        num_standing, num = len(self._kept[False]), len(kept)
        rows = to_probe([key for *_, key in kept], [row >= num_standing for row in range(num)])
        images, labels, keys = zip(*(kept[row] for row in rows), strict=True)
        return (
            torch.stack(images),
            torch.stack(labels),
            list(keys),
            torch.tensor(rows, device=images[0].device) >= num_standing,
        )


def drawn(keys: Sequence[str]) -> list[int]:
    """All rows in an order drawn by their keys, the same at each call and in each set: neighbours are often of one class."""
    order = sample_seeds(keys, "probed")
    return sorted(range(len(keys)), key=lambda row: order[row])


def to_probe(keys: Sequence[str], broken: Sequence[bool]) -> list[int]:
    """At most 32 rows, drawn by their keys: mostly such that the attack left standing, which a better one would break."""
    rows = drawn(keys)
    standing, fallen = ([row for row in rows if broken[row] == which] for which in (False, True))
    fallen = fallen[: max(_FEWEST_BROKEN, MOST_IMAGES - len(standing))]
    return standing[: MOST_IMAGES - len(fallen)] + fallen


def probe(
    classify: Logits,
    attack: Attack[Any],
    image_BCHW: Tensor,
    label_B: Tensor,
    seeds: Sequence[int],
    broken_B: Tensor,
    facts: Facts,
) -> list[Finding]:
    """Look at a few images of a measurement more closely.

    Args:
        classify: what the attack saw, differentiable. Call inside ``input_gradients_only``.
        attack: the main attack.
        image_BCHW, label_B: images in [0, 1] that are right without an attack, 32 at most (more are cut off).
        seeds: one per sample, those of the main attack.
        broken_B: bool, whether the main attack broke them.
        facts: of the measurement; its epsilon and norm are those of the probes.

    Returns:
        ``randomised``, ``batch-size`` and, where there is an epsilon, ``loss-not-rising``, ``weak-beats-strong`` and
        ``black-box``, the gravest first; nothing without images.
    """
    image_BCHW, label_B, broken_B = (rows[:MOST_IMAGES] for rows in (image_BCHW, label_B, broken_B))
    seeds = list(seeds[:MOST_IMAGES])
    if not len(image_BCHW):
        return []
    findings = [_randomised(classify, attack, image_BCHW), _batch_size(classify, attack, image_BCHW, label_B, seeds)]
    if facts.eps:
        findings += _attacks(classify, attack, image_BCHW, label_B, seeds, broken_B, facts)
    return gravest_first(findings)


@torch.no_grad()
def probe_blindly(
    scores: Logits,
    judge: Logits,
    image_BCHW: Tensor,
    label_B: Tensor,
    seeds: Sequence[int],
    facts: Facts,
) -> Finding:
    """``black-box`` alone, for a classifier that is served with random numbers of its own (a test-time defence).

    The search does not stop at the boundary of what it asks: the judge's own noise would put such images back.

    Args:
        scores: what the search asks.
        judge: says whether what was found is a success.
        image_BCHW, label_B: images that the main attack left standing.
        facts: of the measurement; its epsilon and norm are those of the search.
    """
    if not len(image_BCHW) or not facts.eps:
        return Finding(id="black-box", level="ok", sentence=_NONE_LEFT)
    search = Square(SquareConfig(norm=facts.norm, eps=facts.eps, queries=QUERIES))
    found = search.perturb(lambda x: margin(scores(x), label_B), image_BCHW, seeds)
    return _fell("black-box", judge(found.image_BCHW).argmax(1) != label_B, _SEARCH)


def _fell(check: str, broken_B: Tensor, to: str) -> Finding:
    """Of images that stand after the main attack: how many fall to one that should find nothing there."""
    return _share(check, broken_B, f"images that stand after the attack fall to {to}", fail=_MANY)


def _share(check: str, rows_B: Tensor, what: str, **limits: float) -> Finding:
    """A share of few images; one or two of them are doubtful at most, whatever share that is."""
    count = int(rows_B.sum())
    found = share_finding(check, count, len(rows_B), what, **limits)
    return found.model_copy(update={"level": "warn"}) if found.level == "fail" and count < _FEWEST else found


@torch.no_grad()
def _randomised(classify: Logits, attack: Attack[Any], image_BCHW: Tensor) -> Finding:
    """Two passes over the same batch: more than a thousandth of the scale apart is no rounding."""
    one_BC, other_BC = classify(image_BCHW).float(), classify(image_BCHW).float()
    scale_B = (one_BC.amax(1) - one_BC.amin(1)).clamp(min=MIN_RANGE)
    moved = int(((one_BC - other_BC).abs().amax(1) > 1e-3 * scale_B).sum())
    turned = int((one_BC.argmax(1) != other_BC.argmax(1)).sum())
    level: Level = "ok" if not moved else "warn" if _averages(attack) or not turned else "fail"
    sentence = f"{moved} of {len(image_BCHW)} images get other logits in a second pass"
    if moved:
        sentence += f", {turned} another answer; " + (
            "the attack averages over looks" if _averages(attack) else "the attack does not average over looks (EOT)"
        )
    return Finding(id="randomised", level=level, sentence=sentence, value=moved / len(image_BCHW))


def _batch_size(
    classify: Logits, attack: Attack[Any], image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
) -> Finding:
    """Gradients and verdicts of samples alone and in a batch, and the gradient of a mean over many."""
    together_BP = _gradient(classify, image_BCHW, label_B)
    averaged_BP = _gradient(classify, image_BCHW, label_B, 1 / _MEAN_OF)
    few = min(_ALONE, len(image_BCHW))
    rows = [slice(row, row + 1) for row in range(few)]
    alone_BP = torch.cat([_gradient(classify, image_BCHW[row], label_B[row]) for row in rows])
    brief = _brief(attack)

    def verdicts(row: slice) -> Tensor:
        found = brief.attack_classifier(classify, image_BCHW[row], label_B[row], seeds[row])
        with torch.no_grad():
            return classify(found.image_BCHW).argmax(1) != label_B[row]

    turned_B = verdicts(slice(0, few)) != torch.cat([verdicts(row) for row in rows])
    moved = int(_differ(together_BP[:few], alone_BP).sum())
    faded = int(_differ(together_BP, averaged_BP).sum())
    turned, num = int(turned_B.sum()), len(image_BCHW)
    # One verdict in eight may stand on an edge where the rounding of a batched product decides.
    level: Level = "fail" if moved or faded or turned > 1 else "warn" if turned else "ok"
    sentence = (
        f"alone instead of in a batch, {turned} of {few} verdicts and {moved} of {few} gradients differ; "
        f"{faded} of {num} gradients change where the loss is a mean over {_MEAN_OF}"
    )
    return Finding(id="batch-size", level=level, sentence=sentence, value=max(turned / few, moved / few, faded / num))


def _attacks(
    classify: Logits,
    attack: Attack[Any],
    image_BCHW: Tensor,
    label_B: Tensor,
    seeds: Sequence[int],
    broken_B: Tensor,
    facts: Facts,
) -> list[Finding]:
    """Attacks that should find nothing where a sound strong one did not, and whether an ascent ascends."""
    assert facts.eps is not None
    ball: dict[str, Any] = {"norm": facts.norm, "eps": facts.eps}
    steps = _weak_steps(attack)
    ascent = PGD(PGDConfig(**ball, step_size=facts.eps / min(steps, 4), steps=steps))
    losses: list[Tensor] = []

    def loss(attacked_BCHW: Tensor) -> Tensor:
        loss_B = F.cross_entropy(classify(attacked_BCHW).float(), label_B, reduction="none")
        losses.append(loss_B.detach())
        return loss_B

    attacked_BCHW = ascent.perturb(loss, image_BCHW, derived_seeds(seeds, "probe")).image_BCHW
    with torch.no_grad():
        final_BC = classify(attacked_BCHW).float()
    risen_B = F.cross_entropy(final_BC, label_B, reduction="none") > losses[0]
    what = f"images have no higher loss after {steps} steps of PGD than before"
    flat = _share("loss-not-rising", ~risen_B, what, fail=0.25, warn=0.05)

    left = (~broken_B).nonzero().flatten()
    if not len(left):
        return [
            flat,
            *(Finding(id=name, level="ok", sentence=_NONE_LEFT) for name in ("weak-beats-strong", "black-box")),
        ]
    own_seeds = [seeds[row] for row in left.tolist()]

    def broken_by(weak: Attack[Any]) -> Tensor:
        found = weak.attack_classifier(classify, image_BCHW[left], label_B[left], own_seeds)
        with torch.no_grad():
            return classify(found.image_BCHW).argmax(1) != label_B[left]

    one_step = PGD(PGDConfig(**ball, step_size=facts.eps, steps=1, random_start=False))
    weakly_B = (final_BC.argmax(1) != label_B)[left] | broken_by(one_step)
    blindly_B = broken_by(Square(SquareConfig(**ball, queries=QUERIES)))
    weak = _fell("weak-beats-strong", weakly_B, f"one step or PGD-{steps}")
    return [flat, weak, _fell("black-box", blindly_B, _SEARCH)]


def _gradient(classify: Callable[[Tensor], Tensor], image_BCHW: Tensor, label_B: Tensor, scale: float = 1.0) -> Tensor:
    """Input gradient of the summed cross-entropy times ``scale``, divided by it again: ``[B, P]``."""
    image_BCHW = image_BCHW.detach().clone().requires_grad_(True)
    loss = scale * F.cross_entropy(classify(image_BCHW), label_B, reduction="sum")
    (grad_BCHW,) = torch.autograd.grad(loss, image_BCHW)
    return grad_BCHW.flatten(1).double() / scale


def _differ(one_BP: Tensor, other_BP: Tensor) -> Tensor:
    """Gradients that point elsewhere: apart by more than a tenth of the longer, which the rounding of bfloat16 is not."""
    longer_B = torch.maximum(one_BP.norm(dim=1), other_BP.norm(dim=1))
    return (one_BP - other_BP).norm(dim=1) > 0.1 * longer_B


def _brief(attack: Attack[Any]) -> Attack[Any]:
    """The same attack, short: its first stage, a few steps, one start, one target."""
    if hasattr(attack, "attack_defended"):  # it takes more than a classifier; PGD stands in
        attack = PGD(PGDConfig(norm=attack.config.norm, eps=attack.config.eps, step_size=attack.config.eps / 4))
    config, fields = attack.config, type(attack.config).model_fields
    limits = {"steps": _BRIEF_STEPS, "queries": 5 * _BRIEF_STEPS, "restarts": 1, "target_classes": 1}
    change: dict[str, Any] = {name: min(getattr(config, name), most) for name, most in limits.items() if name in fields}
    if isinstance(attack, AutoAttack):
        change |= {"version": "custom", "attacks": attack.stages[:1]}
    return type(attack)(config.model_copy(update=change))


def _weak_steps(attack: Attack[Any]) -> int:
    """Fewer steps than the attack's own, so that the probe is the weaker one."""
    return max(1, min(_WEAK_STEPS, getattr(attack.config, "steps", 2 * _WEAK_STEPS) // 2))


def _averages(attack: Attack[Any]) -> bool:
    """Whether the attack averages over looks at a model with randomness of its own."""
    config = attack.config
    return getattr(config, "eot", 1) > 1 and getattr(config, "version", "rand") == "rand"
