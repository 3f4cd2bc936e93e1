"""Our attacks beside pyautoattack's on one classifier: the verdicts of both, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zsr.attacks.autoattack import AutoAttack, AutoAttackConfig
from zsr.attacks.noise import sample_seeds
from zsr.attacks.square import Square, SquareConfig
from zsr.bench.public_attack import public_predictions

Classifier = Callable[[Tensor], Tensor]


def small_classifier(seed: int = 0, num_classes: int = 10) -> nn.Module:
    """A convolutional network of random weights for images of 8 x 8 pixels."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 1.4 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network.eval().requires_grad_(False)


def small_case(num: int = 200) -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier, images, and as labels what it says."""
    model = small_classifier()
    image_BCHW = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model, image_BCHW, model(image_BCHW).argmax(1)


def our_verdicts(model: Classifier, image_BCHW: Tensor, label_B: Tensor, *, seed: int = 0, **settings: Any) -> Tensor:
    """Whether each sample stands."""
    attack = AutoAttack(AutoAttackConfig(**settings))
    keys = [str(index) for index in range(len(image_BCHW))]
    found = attack.attack_classifier(model, image_BCHW, label_B, sample_seeds(keys, "parity", seed))
    with torch.no_grad():
        return model(found.image_BCHW).argmax(1) == label_B


def their_verdicts(model: Classifier, image_BCHW: Tensor, label_B: Tensor, **settings: Any) -> Tensor:
    """The same from pyautoattack, set to the same steps, targets and queries."""
    return public_predictions(model, image_BCHW, label_B, **settings) == label_B


def assert_parity(case: tuple[Classifier, Tensor, Tensor], stages: tuple[str, ...], **settings: Any) -> None:
    """Robust counts within one sample of 200; verdicts the same but for samples within noise, which are few.

    A sample is within noise if either implementation's own verdict changes with its seed (four of ours, two of theirs).
    """
    ours = torch.stack(
        [our_verdicts(*case, seed=seed, version="custom", attacks=stages, **settings) for seed in range(4)]
    )
    theirs = torch.stack([their_verdicts(*case, seed=seed, attacks=stages, **settings) for seed in range(2)])
    noisy_B = (ours != ours[0]).any(0) | (theirs != theirs[0]).any(0)
    num = len(noisy_B)
    assert 0.05 < theirs.double().mean() < 0.95  # else it could not fail
    assert noisy_B.sum() <= 0.05 * num
    assert not ((ours[0] != theirs[0]) & ~noisy_B).any()
    assert abs(ours.sum(1).double().mean() - theirs.sum(1).double().mean()) <= num / 200


def assert_square_parity(case: tuple[Classifier, Tensor, Tensor], norm: str, eps: float, queries: int) -> None:
    """Mean robust counts over three seeds within four standard errors of their difference.

    Square is a random search: a seed alone moves its count by a few samples, so single runs cannot agree to one.
    """
    # Their code never reaches the last row and column, which are a quarter of an image of 8 x 8 pixels.
    attack, seeds = Square(SquareConfig(norm=norm, eps=eps, queries=queries, edges=False)), range(3)
    model, image_BCHW, label_B = case
    keys = [str(index) for index in range(len(label_B))]
    stands = [
        [~attack.attack_classifier(model, image_BCHW, label_B, sample_seeds(keys, seed)).success_B for seed in seeds],
        [their_verdicts(*case, norm=norm, eps=eps, attacks=("square",), queries=queries, seed=seed) for seed in seeds],
    ]
    counts = torch.tensor([[int(verdict_B.sum()) for verdict_B in side] for side in stands]).double()
    error = (counts.var(1).sum() / len(seeds)).sqrt().clamp_min(1.0)
    assert 0.05 < counts[1].mean() / len(label_B) < 0.95
    assert (counts[0].mean() - counts[1].mean()).abs() <= 4 * error
