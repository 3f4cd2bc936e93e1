"""From the data files to sets that can be read: ``load_suite("tga16").datasets[0].shards("/data")``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from zsr.config.base import Config
from zsr.config.plugins import suggest
from zsr.data.suite.dataset import Dataset, Suite
from zsr.data.suite.schema import DatasetCard, Protocol, SplitName

File = TypeVar("File", bound=Config)

_FOLDER = Path(__file__).parent


def dataset_keys() -> list[str]:
    """Keys of all test sets."""
    return sorted(path.stem for path in (_FOLDER / "datasets").glob("*.yaml"))


def suite_names() -> list[str]:
    """Names of all protocols."""
    return sorted(path.stem for path in (_FOLDER / "protocols").glob("*.yaml"))


def load_card(key: str) -> DatasetCard:
    """What is known about a test set.

    Raises:
        ValueError: there is no such set.
    """
    if key not in dataset_keys():
        raise ValueError(f"{key} is not a known test set{suggest(key, dataset_keys())}")
    return _read(DatasetCard, _FOLDER / "datasets" / f"{key}.yaml")


def load_suite(name: str) -> Suite:
    """The sets of a protocol, in its order, each with the protocol's split and wording.

    Args:
        name: of a protocol, or the path of a YAML file like those in ``zsr/data/suite/protocols``.

    Raises:
        ValueError: there is no such protocol, or its file or a set's contradicts itself.
    """
    own = name.endswith((".yaml", ".yml"))
    if not own and name not in suite_names():
        raise ValueError(f"{name} is not a known suite{suggest(name, suite_names())}")
    protocol = _read(Protocol, Path(name) if own else _FOLDER / "protocols" / f"{name}.yaml")
    datasets = [_bind(protocol, key, split) for key, split in protocol.datasets.items()]
    return Suite(protocol, datasets)


def _bind(protocol: Protocol, key: str, split: SplitName) -> Dataset:
    card = load_card(key)
    if split not in card.splits:
        raise ValueError(f"the protocol {protocol.key} measures on {key} ({split}), which has {', '.join(card.splits)}")
    style = next((style for style in protocol.prompts if style in card.prompts), None)
    if style is None:
        known = ", ".join(card.prompts)
        raise ValueError(f"{key} is worded for {known}, and not for {' or '.join(protocol.prompts)} of {protocol.key}")
    metric = card.metric if protocol.metric == "as_dataset" else protocol.metric
    return Dataset(card, split, card.prompts[style], metric)


def _read(kind: type[File], path: Path) -> File:
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return kind.model_validate(tree)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5]]
        raise ValueError(f"{path.name} is not usable: {'; '.join(faults)}") from None
