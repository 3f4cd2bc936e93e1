"""A test set under a protocol: where it lies, how its classes are worded, and whether it is what it should be."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zsr.data.index import INDEX_FILE, ShardIndex
from zsr.data.shards import ShardSet
from zsr.data.storage import FileMissing, open_storage
from zsr.data.suite.names import clean, imagenet_templates, names_from
from zsr.data.suite.schema import DatasetCard, Metric, NameSource, PromptSet, Protocol, Split, SplitName

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suite:
    """The sets of one protocol."""

    protocol: Protocol
    datasets: list[Dataset]

    def averages(self, training_sets: Collection[str] | None = None) -> dict[str, list[str]]:
        """The sets that each average is taken over, by the average's name.

        Args:
            training_sets: keys of the sets that the models at hand were trained on; the protocol's own by default.
        """
        chance_level = {dataset.key: dataset.card.chance_level for dataset in self.datasets}
        if training_sets is None:
            training_sets = {self.protocol.training_set or ""}
        return leave_out(self.protocol.averages, chance_level, training_sets)


def leave_out(
    averages: Mapping[str, Sequence[str]], chance_level: Mapping[str, bool], training_sets: Collection[str]
) -> dict[str, list[str]]:
    """The sets that each average is taken over, by the average's name.

    Args:
        averages: what each leaves out: sets by key, or ``chance_level`` or ``training_set``.
        chance_level: by key of each set, whether a constant answer scores like a robust model on it.
        training_sets: keys.
    """
    groups = {"chance_level": {key for key, known in chance_level.items() if known}, "training_set": set(training_sets)}
    out = {
        name: set[str]().union(*(groups.get(what, {what}) for what in without)) for name, without in averages.items()
    }
    return {name: [key for key in chance_level if key not in out[name]] for name in averages}


@dataclass(frozen=True)
class Dataset:
    """A test set under a protocol."""

    card: DatasetCard
    split: SplitName
    wording: PromptSet
    metric: Metric

    @property
    def key(self) -> str:
        return self.card.key

    @property
    def expected(self) -> Split:
        """What is known about the split."""
        return self.card.splits[self.split]

    def places(self, root: str) -> list[str]:
        """Addresses where the split may lie under a folder or ``s3://bucket/prefix``."""
        if self.expected.address:
            return [self.expected.address]
        names = [self.expected.published_as, f"{self.key}/{self.split}"]
        return [f"{root.rstrip('/')}/{name}" for name in names if name]

    def find(self, root: str) -> str | None:
        """The first of those addresses that holds shards; None without any.

        Raises:
            ValueError: the place cannot be looked at.
        """
        return next((address for address in self.places(root) if _holds_shards(address)), None)

    def shards(self, root: str, cache_dir: str | Path | None = None) -> ShardSet:
        """The split's shards. The first opening of a set in CLIP_benchmark's layout looks into all its tars.

        Args:
            root: folder or ``s3://bucket/prefix`` that holds the sets; embedded sets need none.
            cache_dir: see ``zsr.data.storage.open_storage``.

        Raises:
            ValueError: the set is not there (the sentence says how to get it), cannot be used, or has other classes than
                it should.
        """
        address = self.find(root)
        if address is None:
            raise ValueError(self.how_to_get(root))
        shards = ShardSet(address, cache_dir)
        self.classes(shards)
        for difference in self.differences(shards.index):
            log.warning("event=unexpected_count set=%s reason=%s", address, difference)
        return shards

    def templates(self, shards: ShardSet | None = None) -> list[str]:
        """Prompts with ``{}`` for the class name.

        Raises:
            ValueError: they come from the set, and none was given.
        """
        templates = self.wording.templates
        if templates == "open_clip":
            return list(imagenet_templates())
        if templates == "from_set":
            if shards is None:
                raise ValueError(f"the templates of {self.key} come from the set itself; open it first")
            return shards.templates
        return list(templates)

    def classes(self, shards: ShardSet | None = None) -> list[str]:
        """Class names as they go into the templates, in the order of the labels.

        Raises:
            ValueError: they come from the set, and none was given; or the set has another number of classes, or the same
                names in another order, so that its labels would mean something else.
        """
        names = self.wording.classes or self.card.classes
        if shards is not None:
            self._check_order(shards)
        if names == "from_set":
            if shards is None:
                raise ValueError(f"the class names of {self.key} come from the set itself; open it first")
            found = shards.classes
        else:
            found = _names(names)
        return [clean(self.wording.rename.get(name, name), self.wording.rules) for name in found]

    @property
    def known_counts(self) -> dict[str, int]:
        """Numbers of classes and samples that the whole split has, as far as the registry knows them."""
        counts = {"classes": self.card.num_classes, "samples": self.expected.samples}
        return {what: number for what, number in counts.items() if number != "unknown"}

    def differences(self, index: ShardIndex) -> list[str]:
        """One sentence for each count that is not the expected one."""
        found = {"classes": len(index.classes), "samples": index.samples}
        return [
            f"{self.key} ({self.split}) has {found[what]} {what}, {number} are expected"
            for what, number in self.known_counts.items()
            if number != found[what]
        ]

    def how_to_get(self, root: str) -> str:
        """What a person does who has not got the set."""
        root, published = root.rstrip("/"), self.expected.published_as
        own = f"{root}/{self.key}/{self.split}"
        ways = [
            f"`zsr data convert FOLDER {own}`, FOLDER having one folder of images a class (from {self.card.source})"
        ]
        if self.expected.made_with:
            ways = [f"`{self.expected.made_with} --out {root}` makes it from {self.card.source}"]
        if published:
            name = published.split("/")[0]
            fetch = f"hf download --repo-type dataset clip-benchmark/{name} --local-dir {name}"
            files = f"classnames.txt, zeroshot_classification_templates.txt and {published.split('/')[1]}/*.tar"
            ways.insert(0, f"`{fetch}` is CLIP_benchmark's publication; it belongs in {root}/{name}, with {files}")
        return (
            f"{self.card.title} ({self.split}) is not under {root}: no shards in {' or '.join(self.places(root))}. "
            f"zsr downloads nothing by itself. {'. Or '.join(ways)}. Licence: {self.card.licence}"
        )

    def _check_order(self, shards: ShardSet) -> None:
        expected = self.card.num_classes
        if expected not in ("unknown", len(shards.classes)):
            raise ValueError(
                f"{shards.address} has {len(shards.classes)} classes, but {self.card.title} has {expected}"
            )
        if self.card.classes == "from_set":
            return
        ours, theirs = (
            [clean(name, ["lower", "spaces"]) for name in names]
            for names in (_names(self.card.classes), shards.classes)
        )
        if ours != theirs and sorted(ours) == sorted(theirs):
            label = next(number for number, (our, their) in enumerate(zip(ours, theirs)) if our != their)
            raise ValueError(
                f"the labels of {shards.address} are in another order than those of {self.card.title}: {label} is "
                f"{theirs[label]!r} there and {ours[label]!r} here; number them alike"
            )


def _names(names: list[str] | NameSource) -> list[str]:
    return list(names) if isinstance(names, list) else list(names_from(names))


def _holds_shards(address: str) -> bool:
    storage = open_storage(address)
    try:
        storage.read_text(INDEX_FILE)
    except FileMissing:
        return bool(storage.list_tars())
    return True
