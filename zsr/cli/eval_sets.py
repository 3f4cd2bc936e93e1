"""Which sets zsr eval measures on: those of a suite, or those named by --data, as far as they are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zsr.data.suite import Dataset, Suite
    from zsr.eval.plan import TestSet


def read_sets(
    suite: Suite | None, data: str, root: str | None, num_samples: int | None, strict: bool
) -> tuple[list[TestSet], list[str]]:
    """The sets that are there, and a sentence for each set of the suite that is not.

    Args:
        data: addresses or names of the registry, separated by commas; left aside with a suite.
        root: folder or ``s3://bucket/prefix`` that holds the sets of the registry.
        num_samples: of each set; None leaves it to the suite.
        strict: whether a missing set of a suite is a mistake.

    Raises:
        ValueError: a set named by ``data`` is not there, cannot be read, or (strict) one of the suite.
    """
    if suite is None:
        names = [name.strip() for name in data.split(",") if name.strip()]
        if not names:
            raise ValueError("--data: names no set; write such as zsr:emoji/test_both")
        return [_named(name, root, num_samples or 0) for name in names], []
    found: list[TestSet] = []
    missing: list[str] = []
    take = num_samples if num_samples is not None else suite.protocol.num_samples or 0
    for dataset in suite.datasets:
        sentence = why_missing(dataset, root)
        if sentence is None:
            found.append(_of_registry(dataset, root, take, suite))
        elif strict:
            raise ValueError(sentence)
        else:
            missing.append(sentence)
    if not found:
        raise ValueError(f"--suite {suite.protocol.key}: none of its sets is there. {missing[0]}")
    return found, missing


def why_missing(dataset: Dataset, root: str | None) -> str | None:
    """Why a set of the registry cannot be opened, and how to get it; None if it is there."""
    if dataset.expected.address:
        return None
    if root is None:
        return f"{dataset.key} ({dataset.split}): say with --root which folder holds the sets"
    return None if dataset.find(root) is not None else dataset.how_to_get(root)


def _named(name: str, root: str | None, num_samples: int) -> TestSet:
    from zsr.data.shards import ShardSet
    from zsr.data.suite import load_card
    from zsr.data.suite.dataset import Dataset
    from zsr.eval.plan import TestSet

    key = _key_of(name)
    if key is not None:
        card = load_card(key)
        split = next(iter(card.splits))
        style = "own" if "own" in card.prompts else next(iter(card.prompts))
        dataset = Dataset(card, split, card.prompts[style], card.metric)
        sentence = why_missing(dataset, root)
        if sentence is not None:
            raise ValueError(f"--data {sentence}")
        test_set = _of_registry(dataset, root, num_samples, None)
        # An embedded set has an address too: by either name it is worded as any set that is named by its address.
        return with_template([test_set], test_set.templates[0] if dataset.expected.address else None)[0]
    shards = ShardSet(name)
    if not shards.has_labels:
        raise ValueError(f"{shards.address}: has no labels; accuracy needs a set with classes")
    return TestSet(
        name, "all", shards.index.name, shards, shards.classes, shards.templates[:1], num_samples=num_samples
    )


def _key_of(name: str) -> str | None:
    """The registry's key of a set that is named by it or, where it is embedded, by its address; None for other addresses."""
    from zsr.data.suite import dataset_keys, load_card

    if name in dataset_keys():
        return name
    if not name.startswith("zsr:"):
        return None
    first = {next(iter(load_card(key).splits.values())).address: key for key in dataset_keys()}
    return first.get(name.rstrip("/"))


def _of_registry(dataset: Dataset, root: str | None, num_samples: int, suite: Suite | None) -> TestSet:
    from zsr.eval.plan import TestSet

    return TestSet.of_suite(
        dataset,
        dataset.shards(root or ""),
        suite=None if suite is None else suite.protocol.key,
        resolution="model" if suite is None else suite.protocol.attack_resolution,
        num_samples=num_samples,
    )


def with_template(test_sets: Sequence[TestSet], template: str | None) -> list[TestSet]:
    """The sets under one prompt; as they are without one."""
    if template is None:
        return list(test_sets)
    return [dataclasses.replace(test_set, templates=[template]) for test_set in test_sets]
