"""PGD on a classifier of many prompts: text encoded once, against a loop that encodes it in every step.

Theirs is an evaluation in TeCoA's way (METHODS.md 2.4): prompts tokenised for every batch and encoded at every look at the
model, gradients of all weights filled by the attack's backward pass. Both start from the same noise. What ours
pays once for the prompts is timed apart, and ``with_text`` has it shared out over the batches measured.

With the embedded model at batch 40 the text of 1000 prompts is 2.8 times the images' arithmetic, as ViT-B/32's at 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zsr.attacks.base import input_gradients_only
from zsr.attacks.noise import sample_seeds
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.bench.compare import Progress
from zsr.bench.ours import class_names, make_batch
from zsr.bench.public_attack import plain_copy
from zsr.bench.reference import EPS, STEP_SIZE, TEMPLATE, OfficialTeCoA
from zsr.bench.sides import Sides, Spent, in_turns, timed
from zsr.engine.quick_eval import ZeroShotHead
from zsr.models import RobustCLIP, TextBank

BAR = 5.0
"""Least ratio of their time to ours."""


@dataclass(frozen=True)
class PromptsRow:
    """PGD by both, seconds for all batches.

    Attributes:
        agree: share of images, clean and attacked, that both put into the same class.
        text: what ours took to encode the prompts, once.
        with_text: ratio of processor time if that is counted to these batches alone.
    """

    prompts: int
    batch_size: int
    steps: int
    agree: float
    text: Spent
    with_text: float
    time: Sides

    def reached(self, device: str) -> bool:
        return self.time.ratio(device) >= BAR


def compare_prompts(
    model: RobustCLIP,
    *,
    num_prompts: int = 1000,
    batch_size: int = 40,
    steps: int = 10,
    rounds: int = 2,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PromptsRow:
    """Classify a batch clean and after PGD, by both, ``rounds`` times."""
    names = class_names(num_prompts)
    official = OfficialTeCoA.of(plain_copy(model), names)
    official.model.eval()
    head, text = timed(lambda: ZeroShotHead(model, TextBank(model), names, [TEMPLATE]), device)
    attack = PGD(PGDConfig(eps=EPS, step_size=STEP_SIZE, steps=steps))
    batch = make_batch(batch_size, num_prompts, model.image_size)
    image_BCHW, label_B = batch.image.to(device).float() / 255, batch.label.to(device)

    def ours(number: int) -> torch.Tensor:
        seeds = sample_seeds(batch.key, "eval", number)
        with input_gradients_only(model.image):
            found = attack.attack_classifier(head, image_BCHW, label_B, seeds)
            with torch.no_grad():
                return torch.cat([head(x).argmax(-1) for x in (image_BCHW, found.image_BCHW)])

    def theirs(number: int) -> torch.Tensor:
        seeds = sample_seeds(batch.key, "eval", number)
        tokens = official.tokenizer([TEMPLATE.format(name) for name in names]).to(device)
        adv_BCHW = official.attack(image_BCHW, label_B, tokens, seeds, steps)
        with torch.no_grad():
            return torch.cat([official.logits(official.model, x, tokens).argmax(-1) for x in (image_BCHW, adv_BCHW)])

    (mine, other), (spent, their_spent) = in_turns([ours, theirs], rounds, device, "prompts", progress)
    sides = Sides.of(spent, their_spent)
    agree = (torch.cat(mine) == torch.cat(other)).double().mean().item()
    with_text = sides.theirs.cpu_s / (sides.ours.cpu_s + text.cpu_s)
    return PromptsRow(num_prompts, batch_size, steps, agree, text, with_text, sides)
