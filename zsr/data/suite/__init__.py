"""The zero-shot test sets and the protocols that measure on them, as data files: ``load_suite("tga16")``."""

from zsr.data.suite.dataset import Dataset, Suite, leave_out
from zsr.data.suite.registry import dataset_keys, load_card, load_suite, suite_names
from zsr.data.suite.schema import AttackEntry, DatasetCard, PromptSet, Protocol, Split
from zsr.data.suite.superclasses import match_superclasses, read_superclasses

__all__ = [
    "AttackEntry",
    "Dataset",
    "DatasetCard",
    "PromptSet",
    "Protocol",
    "Split",
    "Suite",
    "dataset_keys",
    "leave_out",
    "load_card",
    "load_suite",
    "match_superclasses",
    "read_superclasses",
    "suite_names",
]
