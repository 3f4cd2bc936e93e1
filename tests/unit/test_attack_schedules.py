"""Epsilon schedules: pure functions of progress that stay in [0, 1] and end where they say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zsr.attacks.schedules import (
    Constant,
    ConstantConfig,
    Cosine,
    CosineConfig,
    Linear,
    LinearConfig,
    Step,
    StepConfig,
    Warmup,
    WarmupConfig,
)
from zsr.config.schema import SCHEDULES

UNIT = st.floats(0, 1)


@st.composite
def steps(draw):
    at = sorted(draw(st.lists(UNIT, min_size=0, max_size=4)))
    return Step(StepConfig(at=at, factors=draw(st.lists(UNIT, min_size=len(at) + 1, max_size=len(at) + 1))))


LINEAR = st.builds(lambda start, end: Linear(LinearConfig(start=start, end=end)), UNIT, UNIT)
COSINE = st.builds(lambda start, end: Cosine(CosineConfig(start=start, end=end)), UNIT, UNIT)
WARMUP = st.builds(lambda start, until: Warmup(WarmupConfig(start=start, until=until)), UNIT, st.floats(1e-6, 1))
ANY = st.one_of(st.just(Constant(ConstantConfig())), LINEAR, COSINE, WARMUP, steps())


@given(ANY, UNIT)
def test_factor_stays_in_the_unit_interval(schedule, progress):
    assert 0 <= schedule.factor(progress) <= 1


@given(ANY, UNIT)
def test_factor_is_a_pure_function_of_progress(schedule, progress):
    twin = SCHEDULES.build(schedule.config)
    first = schedule.factor(progress)
    schedule.factor(1 - progress)
    assert first == schedule.factor(progress) == twin.factor(progress)


@given(st.one_of(LINEAR, COSINE))
def test_linear_and_cosine_reach_both_ends_exactly(schedule):
    assert schedule.factor(0.0) == schedule.config.start
    assert schedule.factor(1.0) == schedule.config.end


@given(st.one_of(LINEAR, COSINE), UNIT, UNIT)
def test_linear_and_cosine_move_one_way_between_their_ends(schedule, one, other):
    early, late = sorted((one, other))
    change = schedule.factor(late) - schedule.factor(early)
    assert change * (schedule.config.end - schedule.config.start) >= 0 or abs(change) < 1e-15
    low, high = sorted((schedule.config.start, schedule.config.end))
    assert low - 1e-15 <= schedule.factor(one) <= high + 1e-15


@given(WARMUP, UNIT, UNIT)
def test_warmup_rises_and_is_full_from_its_end_on(schedule, one, other):
    early, late = sorted((one, other))
    assert schedule.factor(0.0) == schedule.config.start
    assert schedule.factor(early) <= schedule.factor(late) + 1e-15
    assert schedule.factor(max(one, schedule.config.until)) == 1.0


@given(UNIT)
def test_constant_is_one(progress):
    assert Constant(ConstantConfig()).factor(progress) == 1.0


@given(UNIT)
def test_cosine_is_slow_at_its_ends(progress):
    risen = Cosine(CosineConfig()).factor(progress)
    assert risen == pytest.approx(math.sin(math.pi * progress / 2) ** 2, abs=1e-12)


@given(steps(), UNIT)
def test_step_has_the_factor_of_the_interval_that_progress_is_in(schedule, progress):
    config = schedule.config
    edges = [-math.inf, *config.at, math.inf]
    wanted = [config.factors[i] for i in range(len(config.factors)) if edges[i] <= progress < edges[i + 1]]
    assert [schedule.factor(progress)] == wanted


@given(steps())
def test_a_step_happens_at_its_edge_not_after_it(schedule):
    config = schedule.config
    for i, edge in enumerate(config.at):
        if edge not in config.at[i + 1 :]:
            assert schedule.factor(edge) == config.factors[i + 1]
        before = math.nextafter(edge, -1)
        if edge > 0 and edge not in config.at[:i] and (i == 0 or config.at[i - 1] <= before):
            assert schedule.factor(before) == config.factors[i]


@pytest.mark.parametrize(
    ("config_class", "settings", "says"),
    [
        (StepConfig, {"at": [0.5], "factors": [1.0]}, "factors has 1 entries; 1 changes need 2"),
        (StepConfig, {"at": [0.7, 0.3], "factors": [0, 0.5, 1]}, "should increase"),
        (StepConfig, {"at": [0.5], "factors": [0.5, 1.5]}, "less than or equal to 1"),
        (StepConfig, {"at": [1.5], "factors": [0.5, 1]}, "less than or equal to 1"),
        (LinearConfig, {"start": -0.1}, "greater than or equal to 0"),
        (LinearConfig, {"end": float("nan")}, "less than or equal to 1"),
        (CosineConfig, {"end": 1.01}, "less than or equal to 1"),
        (WarmupConfig, {"until": 0}, "greater than 0"),
        (WarmupConfig, {"until": 2}, "less than or equal to 1"),
        (ConstantConfig, {"start": 1}, "not permitted"),
    ],
)
def test_settings_that_make_no_schedule_are_rejected(config_class, settings, says):
    with pytest.raises(ValidationError, match=says):
        config_class(**settings)


def test_the_registry_knows_them_all():
    assert {"constant", "cosine", "linear", "step", "warmup"} <= set(SCHEDULES.names())
