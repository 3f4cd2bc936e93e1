"""The index of a set of shards: what it holds, shard by shard, and what is needed to trust it.

``index.json`` lies beside the shards. Shards are plain tar files in WebDataset's layout (``key.jpg`` and ``key.cls``
next to each other), so that other software reads them too; the index adds what a tar cannot say: class names, prompt
templates, the number of samples (a plan needs it before any shard is read) and a checksum of each file.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from zsr.config.base import Config

INDEX_FILE = "index.json"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# A shard's name becomes a file name in the cache: it must stay inside that folder.
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]


class Shard(Config):
    """One tar file of a set."""

    file: ShardName
    samples: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Digest


class ShardFile(NamedTuple):
    """A tar file as it was found, before anyone read it."""

    file: str
    bytes: int
    version: str
    """Another one means other content: time of the last change, or the object's tag."""


class ShardIndex(Config):
    """Everything that is known about a set without reading its shards; classes are numbered in list order. A set without
    classes has no labels: objectives that use none can train on it."""

    format: Literal["zsr-shards-1"] = "zsr-shards-1"
    name: str
    classes: list[str]
    templates: list[str]
    samples: Annotated[int, Field(ge=1)]
    shards: list[Shard]
    class_counts: list[int]
    licence: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _adds_up(self) -> ShardIndex:
        total = sum(shard.samples for shard in self.shards)
        if total != self.samples:
            raise ValueError(f"samples={self.samples}, but the shards listed hold {total}")
        if len(self.class_counts) != len(self.classes):
            raise ValueError(f"class_counts has {len(self.class_counts)} entries for {len(self.classes)} classes")
        if self.classes and sum(self.class_counts) != self.samples:
            raise ValueError(f"class_counts adds up to {sum(self.class_counts)}, but samples={self.samples}")
        files = [shard.file for shard in self.shards]
        if len(set(files)) != len(files):
            raise ValueError("shards lists a file twice")
        return self

    @property
    def shard_sizes(self) -> list[int]:
        return [shard.samples for shard in self.shards]

    def to_json(self) -> str:
        """The text of index.json; equal indexes give equal bytes."""
        return self.model_dump_json(indent=1) + "\n"


def parse_index(text: str, address: str) -> ShardIndex:
    """Read the text of an index.json.

    Args:
        text: the file's content.
        address: the set's address, for messages.

    Raises:
        ValueError: the text is no index, or its numbers contradict each other; all faults in one sentence.
    """
    try:
        return ShardIndex.model_validate_json(text)
    except ValidationError as error:
        faults = [
            ".".join(map(str, fault["loc"])) + ": " * bool(fault["loc"]) + fault["msg"].removeprefix("Value error, ")
            for fault in error.errors()[:5]
        ]
        raise ValueError(f"{INDEX_FILE} of the set {address} is not usable: {'; '.join(faults)}") from None
