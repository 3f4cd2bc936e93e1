"""Overrides: what is set is what is read, order does not matter, another name starts a group afresh."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zsr.config import ConfigError, apply_overrides, merge
from zsr.config.overrides import parse_value

unhurried = settings(deadline=None)  # a busy machine is no bug
KEYS = st.sampled_from(["alpha", "beta", "gamma", "delta", "weight_mhe", "lr"])
PATHS = st.lists(KEYS, min_size=1, max_size=3).map(tuple)
TEXT = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)
SCALARS = st.one_of(
    st.booleans(), st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False), st.none(), TEXT
)


def write(value: Any) -> str:
    """As a person would type it on a command line, quotes where YAML needs them."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def read(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def prefix_free(paths: list[tuple[str, ...]]) -> bool:
    return not any(a != b and b[: len(a)] == a for a in paths for b in paths)


PATH_SETS = st.lists(PATHS, min_size=1, max_size=6, unique=True).filter(prefix_free)


@unhurried
@given(PATHS, SCALARS)
def test_setting_then_reading_gives_the_value(path: tuple[str, ...], value: Any) -> None:
    tree = apply_overrides({}, [f"{'.'.join(path)}={write(value)}"])
    assert read(tree, path) == value
    assert type(read(tree, path)) is type(value)


@unhurried
@given(PATH_SETS, st.data())
def test_distinct_paths_in_any_order_give_the_same(paths: list[tuple[str, ...]], data: st.DataObject) -> None:
    overrides = [f"{'.'.join(path)}={write(data.draw(SCALARS))}" for path in paths]
    assert apply_overrides({}, overrides) == apply_overrides({}, data.draw(st.permutations(overrides)))


@unhurried
@given(PATH_SETS, PATHS, SCALARS)
def test_other_settings_stay_and_the_base_is_untouched(
    paths: list[tuple[str, ...]], path: tuple[str, ...], value: Any
) -> None:
    base = apply_overrides({}, [f"{'.'.join(other)}={place}" for place, other in enumerate(paths)])
    before = copy.deepcopy(base)
    if not prefix_free([*paths, path]):
        return
    after = apply_overrides(base, [f"{'.'.join(path)}={write(value)}"])
    assert base == before
    for place, other in enumerate(paths):
        if other != path:
            assert read(after, other) == place


@unhurried
@given(st.dictionaries(KEYS, SCALARS), st.dictionaries(KEYS, st.integers()), st.data())
def test_another_name_resets_the_group(old: dict[str, Any], new: dict[str, int], data: st.DataObject) -> None:
    base = {"seed": 3, "objective": {"name": "tima", **old}}
    overrides = ["objective.name=tecoa", *(f"objective.{key}={value}" for key, value in new.items())]
    tree = apply_overrides(base, data.draw(st.permutations(overrides)))
    assert tree == {"seed": 3, "objective": {"name": "tecoa", **new}}


@unhurried
@given(st.dictionaries(KEYS, SCALARS))
def test_the_same_name_keeps_the_group(old: dict[str, Any]) -> None:
    base = {"objective": {"name": "tima", **old}}
    assert apply_overrides(base, ["objective.name=tima"]) == base
    assert apply_overrides(base, ["objective=tima"]) == base


@unhurried
@given(st.dictionaries(KEYS, SCALARS), st.dictionaries(KEYS, SCALARS))
def test_merge_takes_the_upper_where_both_say_something(lower: dict[str, Any], upper: dict[str, Any]) -> None:
    assert merge({"train": lower}, {"train": upper}) == {"train": {**lower, **upper}}


def test_nested_names_reset_only_their_own_group() -> None:
    base = {"attack": {"name": "pgd", "eps": 0.1, "schedule": {"name": "linear", "start": 0.5}}}
    tree = apply_overrides(base, ["attack.schedule.name=cosine"])
    assert tree == {"attack": {"name": "pgd", "eps": 0.1, "schedule": {"name": "cosine"}}}


def test_the_runs_own_name_resets_nothing() -> None:
    assert apply_overrides({"name": "a", "seed": 1}, ["name=b"]) == {"name": "b", "seed": 1}


def test_another_tracker_keeps_the_experiment() -> None:
    base = {"tracking": {"name": "jsonl", "experiment": "mine"}}
    assert apply_overrides(base, ["tracking.name=mlflow"])["tracking"] == {"name": "mlflow", "experiment": "mine"}


def test_a_name_alone_may_stand_for_a_group() -> None:
    assert apply_overrides({"objective": "tima"}, ["objective.weight_mhe=1"]) == {
        "objective": {"name": "tima", "weight_mhe": 1}
    }
    for overrides in (["objective=tecoa", "objective.lr=1"], ["objective.lr=1", "objective=tecoa"]):
        assert apply_overrides({"objective": {"name": "tima", "beta": 2}}, overrides) == {
            "objective": {"name": "tecoa", "lr": 1}
        }


def test_the_later_of_two_equal_paths_counts() -> None:
    assert apply_overrides({}, ["seed=1", "seed=2"]) == {"seed": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("0.1", 0.1),
        ("2/255", "2/255"),
        ("1e-4", "1e-4"),  # YAML 1.1; the field that wants a number reads it
        ("[a, b]", ["a", "b"]),
        ("{name: pgd, steps: 3}", {"name": "pgd", "steps": 3}),
        ("null", None),
        ("", None),
        ("zsr:emoji/train", "zsr:emoji/train"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("{} in a sketch", "{} in a sketch"),
        ("a drawing: {}", "a drawing: {}"),
        ("2026-11-22", "2026-11-22"),
        ("- x", "- x"),
    ],
)
def test_values_are_read_as_yaml_scalars(text: str, value: Any) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize("bad", ["seed", "=3", "a..b=1", ".a=1", "a b=1", "1a=2"])
def test_what_is_not_key_value_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="should be key=value"):
        apply_overrides({}, [bad])


def test_a_path_through_a_plain_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs\.x=1: .* train\.epochs is one value"):
        apply_overrides({"train": {"epochs": 3}}, ["train.epochs.x=1"])


def test_all_bad_overrides_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({}, ["one", "two", "seed=1"])
    assert len(caught.value.problems) == 2
