"""Result cards for tests of what reads them: any number of models, sets, attacks and budgets, made through the card's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zsr.eval.card import (
    AttackInfo,
    Cost,
    DatasetInfo,
    DefenseInfo,
    ModelInfo,
    ProtocolInfo,
    ResultCard,
    Share,
    column_id,
    digest_of,
    write_card,
)


def make_card(
    model: str = "base",
    dataset: str = "pets",
    robust: int | None = 40,
    *,
    clean: int = 80,
    total: int = 100,
    eps: int = 4,
    seed: int = 0,
    defense: str | None = None,
    checks: list[Any] | None = None,
    weights: str | None = None,
    protocol: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    attack: dict[str, Any] | None = None,
    **rest: Any,
) -> ResultCard:
    """A card; ``robust=None`` is one of clean accuracy alone, ``eps`` counts 1/255."""
    about = ProtocolInfo(
        **{"suite": None, "metric": "accuracy", "resolution": "model", "preprocessing": "central square",
           "normalization": "the model's own", "precision": "fp32"} | (protocol or {})
    )  # fmt: skip
    measured = DatasetInfo(
        **{"key": dataset, "split": "test", "title": f"The {dataset}", "address": f"/data/{dataset}", "samples": total,
           "of": 2 * total, "subset_digest": digest_of(dataset, total), "classes": 5, "classes_digest": "c", "chance": 0.2,
           "templates": ["a photo of a {}."], "templates_digest": "t", "pixels": 32} | (data or {})
    )  # fmt: skip
    weapon = AttackInfo(
        **{"name": "autoattack", "title": "AutoAttack", "norm": "linf", "eps": eps / 255, "eps_text": f"{eps}/255",
           "settings": {"steps": 100}, "stages": ["apgd-ce", "square"]} | (attack or {})
    )  # fmt: skip
    column = column_id(about, measured, None if robust is None else weapon)
    shield = None
    if defense:
        shield = DefenseInfo(name=defense, settings={"steps": 2}, gate="own", cost_units=5, seed=seed)
    digest = weights or digest_of(model)
    return ResultCard(
        id=digest_of(column, digest, defense, seed, rest.get("created")),
        column=column,
        protocol=about,
        dataset=measured,
        model=ModelInfo(name=model, label=model, arch="ViT-T", weights_digest=digest, image_size=32, logit_scale=100.0),
        defense=shield,
        attack=None if robust is None else weapon,
        seed=seed,
        clean=Share.of(clean, total),
        robust=None if robust is None else Share.of(robust, total),
        survivors={}
        if robust is None
        else {"apgd-ce": Share.of(min(robust + 5, clean), total), "square": Share.of(robust, total)},
        checks=checks or [],
        cost=Cost(seconds=12.5, images_per_s=8.0, encoder_passes=20_000, device="cpu"),
        environment={"zsr": "0.3.0", "torch": "2.12.0"},
        created=rest.get("created", "2026-01-01T00:00:00Z"),
    )


def store(cards: list[ResultCard], folder: Path) -> Path:
    """Write cards the way an evaluation lays them out."""
    for card in cards:
        write_card(card, folder / card.model.label / card.dataset.key / f"{card.id}.card.json")
    return folder


def store_examples(card: ResultCard, folder: Path, *, side: int = 32, count: int = 4) -> Path:
    """Beside a card: pictures with a gradient, perturbed by the card's epsilon; the first ones fool the model."""
    assert card.attack is not None
    rng = np.random.default_rng(0)
    ramp = np.linspace(40, 200, side)[None, :, None, None] + np.array([0, 20, 40])
    clean = np.broadcast_to(ramp, (count, side, side, 3)).astype(np.uint8)
    attacked = clean.astype(np.float32) / 255 + card.attack.eps * rng.choice([-1, 1], clean.shape).astype(np.float32)
    path = folder / card.model.label / card.dataset.key / f"{card.id}.examples.npz"
    label = np.zeros(count, dtype=np.int64)
    np.savez_compressed(
        path, clean=clean, attacked=attacked, key=np.array([f"k{n}" for n in range(count)]), label=label, clean_pred=label,
        attacked_pred=(np.arange(count) < count // 2).astype(np.int64), class_names=np.array(["cat & <dog>", "red_fox"]),
    )  # fmt: skip
    return path
