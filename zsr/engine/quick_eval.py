"""Clean and robust zero-shot accuracy on a set, cheap enough to run inside training.

``zsr eval`` measures the same with a ledger and cards (zsr/eval/runner.py). Ranks share the samples; the only collective
comes at the end, so no rank waits for another in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zsr.attacks.base import Attack, AttackResult, input_gradients_only
from zsr.attacks.checks import Facts, Finding, judge, losses_of
from zsr.attacks.noise import sample_seeds
from zsr.data.pipeline import eval_batches, subset_ids
from zsr.data.shards import ShardSet
from zsr.engine.distributed import sum_over_ranks
from zsr.models import RobustCLIP, TextBank

Progress = Callable[[int, int], None]
"""Called with (samples done, samples to do) on this rank."""

Watch = Callable[[Tensor, Tensor, Sequence[str], Tensor], None]
"""Called with what was attacked: clean images ``[B, C, H, W]``, labels, keys, and whether the attack broke them (bool)."""

_CLEAN, _ROBUST, _COUNT = range(3)


@dataclass(frozen=True)
class EvalResult:
    """Accuracies in [0, 1].

    Attributes:
        robust_acc: share of samples classified right both before and after the attack; None without an attack.
        zero_grad_frac: share of attacked samples whose input gradient was exactly zero at some step: 0 for a sound
            attack on a sound model.
        survivors: for an attack in stages, the share of samples still right after each.
        findings: of the cheap checks (zsr/attacks/checks.py), the gravest first.
    """

    clean_acc: float
    robust_acc: float | None
    zero_grad_frac: float | None
    num_samples: int
    num_classes: int
    survivors: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = field(default=(), compare=False)


class ZeroShotHead:
    """Unit class embeddings of a set and the model's scale: images to logits.

    Args:
        model: with the text map as it is now.
        bank: the model's text bank.
        class_names, templates: of the set.
    """

    def __init__(self, model: RobustCLIP, bank: TextBank, class_names: Sequence[str], templates: Sequence[str]) -> None:
        self.model = model
        features_CKE = bank.features(class_names, templates)
        self.text_CD = model.class_embeddings(features_CKE).detach()

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Logits ``[B, C]`` of pixels in [0, 1]."""
        return self.logits(self.model.encode_image(image_BCHW).embed_BD)

    def logits(self, embed_BD: Tensor) -> Tensor:
        """Logits ``[B, C]`` of unit image embeddings."""
        return self.model.logit_scale * embed_BD @ self.text_CD.T


def evaluate(
    head: ZeroShotHead,
    shards: ShardSet,
    attack: Attack | None = None,  # type: ignore[type-arg]
    *,
    num_samples: int = 0,
    batch_size: int = 128,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> EvalResult:
    """Measure a zero-shot classifier on a set.

    A sample counts as robust if it is right without and with the attack. Only samples that are right are attacked: the
    others are lost already. The attack maximises its own loss on the logits (cross-entropy for PGD), whatever the model was
    trained with.

    Args:
        num_samples: the head of the set's fixed subset order; 0 means all.
        seed: of the attack's random starts; with the sample's key it fixes them.
        rank, world_size: share the work; every rank gets the same result.

    Raises:
        ValueError, OSError: the set cannot be read.
    """
    device = head.text_CD.device
    stages = () if attack is None else attack.stages
    counts = torch.zeros(3 + len(stages), dtype=torch.float64, device=device)
    facts = _facts(attack, shards.classes)
    mine = len(subset_ids(len(shards), num_samples)[rank::world_size])
    done = 0
    with input_gradients_only(head.model.image), head.model.image.hiding_columns(seed):
        for batch in eval_batches(
            shards,
            image_size=head.model.image_size,
            batch_size=batch_size,
            num_samples=num_samples,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        ):
            image_BCHW, label_B = batch.image.to(device).float() / 255, batch.label.to(device)
            with torch.no_grad():
                logits_BC = head(image_BCHW)
            facts.see_clean(logits_BC, label_B)
            right_B = logits_BC.argmax(-1) == label_B
            counts[_CLEAN] += right_B.sum()
            counts[_COUNT] += len(batch)
            if attack is not None and right_B.any():
                attacked = attack_rows(head, attack, image_BCHW, label_B, batch.key, right_B, seed)
                with torch.no_grad():
                    logits_BC = head(attacked.image_BCHW)
                clean_BCHW, own_label_B = image_BCHW[right_B], label_B[right_B]
                facts.see_attacked(clean_BCHW, attacked.image_BCHW, logits_BC, attacked.zero_grad_B, own_label_B)
                broken_B = logits_BC.argmax(-1) != own_label_B
                counts[_ROBUST] += (~broken_B).sum()
                if watch is not None:
                    keys = [batch.key[row] for row in right_B.nonzero().flatten().tolist()]
                    watch(clean_BCHW, own_label_B, keys, broken_B)
                if attacked.stage_B is not None:
                    counts[3:] += (attacked.stage_B[:, None] > torch.arange(len(stages), device=device)).sum(0)
            done += len(batch)
            if progress is not None:
                progress(done, mine)
    everything = sum_over_ranks(torch.cat([counts, facts.sums.to(counts)]))
    clean, robust, count, *standing = everything[: len(counts)].tolist()
    facts.sums = everything[len(counts) :].long()
    findings = judge(facts)
    zero_grad = next((found.value for found in findings if found.id == "zero-gradients"), None) or 0.0
    return EvalResult(
        clean_acc=clean / count,
        robust_acc=None if attack is None else robust / count,
        zero_grad_frac=None if attack is None else zero_grad,
        num_samples=int(count),
        num_classes=len(head.text_CD),
        survivors={stage: standing_now / count for stage, standing_now in zip(stages, standing, strict=True)},
        findings=tuple(findings),
    )


def _facts(attack: Attack | None, class_names: Sequence[str]) -> Facts:  # type: ignore[type-arg]
    """What the checks are told beforehand; an attack without a threat model has no ball to stay in."""
    if attack is None or not hasattr(attack, "threat"):
        return Facts(class_names)
    threat = attack.threat()
    return Facts(class_names, eps=threat.eps, norm=threat.norm, losses=losses_of(attack))


def attack_rows(
    head: ZeroShotHead,
    attack: Attack,  # type: ignore[type-arg]
    image_BCHW: Tensor,
    label_B: Tensor,
    keys: Sequence[str],
    rows_B: Tensor,
    seed: int,
) -> AttackResult:
    """Attack those samples of a batch that ``rows_B`` (bool) marks; all evaluations attack a sample the same way.

    The result has a row for each of them, at least one. Call inside :func:`input_gradients_only`.
    """
    rows = rows_B.nonzero().flatten()
    seeds = attack_seeds([keys[i] for i in rows.tolist()], seed)
    return attack.attack_classifier(head, image_BCHW[rows], label_B[rows], seeds)


def attack_seeds(keys: Sequence[str], seed: int) -> list[int]:
    """Seeds with which evaluations attack samples of these keys."""
    return sample_seeds(keys, "eval", seed)
