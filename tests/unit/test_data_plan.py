"""The plan's promises, over random sets, worlds, batches and windows."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zsr.data.plan import BEGIN, EpochPlan, Position, count_steps

NO_DEADLINE = settings(deadline=None)  # a busy machine is no fault of the plan
SIZES = st.lists(st.integers(1, 23), min_size=1, max_size=14)
LAST = st.sampled_from(["drop", "complete"])
SEED = st.integers(0, 2**40)


@st.composite
def plans(draw):
    """A plan and a world size that divides its batch."""
    sizes, last, world_size = draw(SIZES), draw(LAST), draw(st.integers(1, 5))
    global_batch = world_size * draw(st.integers(1, 12))
    assume(last == "complete" or global_batch <= sum(sizes))
    epoch, window = draw(st.integers(0, 99)), draw(st.integers(1, 9))
    return EpochPlan(sizes, draw(SEED), epoch, global_batch, last, window), world_size


def all_ids(plan: EpochPlan) -> np.ndarray:
    return np.concatenate([plan.step_ids(step) for step in range(plan.num_steps)])


@NO_DEADLINE
@given(plans())
def test_order_holds_every_sample_once(case):
    plan, _ = case
    assert sorted(plan.order.tolist()) == list(range(plan.num_samples))


@NO_DEADLINE
@given(plans())
def test_epoch_shows_every_sample_once_but_for_the_stated_tail(case):
    plan, _ = case
    seen, tail = all_ids(plan), plan.num_samples % plan.global_batch
    if plan.last == "drop":
        assert seen.tolist() == plan.order[: plan.num_samples - tail].tolist()
    else:
        fill = (plan.global_batch - tail) % plan.global_batch
        assert seen.tolist() == plan.order.tolist() + np.resize(plan.order, fill).tolist()
    assert len(seen) == plan.num_steps * plan.global_batch


@NO_DEADLINE
@given(plans())
def test_ranks_partition_each_step(case):
    plan, world_size = case
    for step in range(plan.num_steps):
        shares = [plan.rank_ids(step, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {plan.global_batch // world_size}
        assert np.concatenate(shares).tolist() == plan.step_ids(step).tolist()


@NO_DEADLINE
@given(plans(), st.data())
def test_resume_in_another_world_sees_exactly_the_rest(case, data):
    plan, world_size = case
    stop = data.draw(st.integers(0, plan.num_steps))
    again = EpochPlan(plan.shard_sizes.tolist(), plan.seed, plan.epoch, plan.global_batch, plan.last, plan.window)
    before = [plan.rank_ids(step, rank, world_size) for step in range(stop) for rank in range(world_size)]
    after = [again.rank_ids(step, 0, 1) for step in range(stop, plan.num_steps)]
    assert Counter(np.concatenate(before + after).tolist()) == Counter(all_ids(plan).tolist())


@NO_DEADLINE
@given(plans())
def test_a_window_mixes_only_its_own_shards(case):
    plan, _ = case
    shard_of = np.repeat(np.arange(len(plan.shard_sizes)), plan.shard_sizes)
    remaining = shard_of[plan.order].tolist()
    seen: set[int] = set()
    while remaining:
        # Walk one window: the next `window` unseen shards must be exhausted before any other one begins.
        length, members = 0, set()
        for shard in remaining:
            if shard not in members and len(members) == plan.window:
                break
            members.add(shard)
            length += 1
        assert not members & seen
        assert length == sum(plan.shard_sizes[list(members)])
        seen |= members
        remaining = remaining[length:]


@NO_DEADLINE
@given(plans())
def test_windows_say_which_shards_a_step_needs(case):
    plan, _ = case
    shard_of = np.repeat(np.arange(len(plan.shard_sizes)), plan.shard_sizes)
    assert sorted(np.concatenate(plan.windows).tolist()) == list(range(len(plan.shard_sizes)))
    for step in range(plan.num_steps):
        begun = plan.windows[: plan.window_at(step) + 1]
        # Every shard of the step lies in a window begun by now, and the newest of these is really needed.
        used = set(shard_of[plan.step_ids(step)].tolist())
        assert used <= set(np.concatenate(begun).tolist())
        assert used & set(begun[-1].tolist())


@NO_DEADLINE
@given(SIZES, SEED, st.integers(0, 50), st.integers(1, 9))
def test_order_depends_on_seed_and_epoch_and_not_on_the_batch(sizes, seed, epoch, window):
    order = EpochPlan(sizes, seed, epoch, 1, window=window).order.tolist()
    assert EpochPlan(sizes, seed, epoch, sum(sizes), "complete", window).order.tolist() == order
    if sum(sizes) >= 30:  # fewer samples may fall into the same order by chance
        assert EpochPlan(sizes, seed, epoch + 1, 1, window=window).order.tolist() != order
        assert EpochPlan(sizes, seed + 1, epoch, 1, window=window).order.tolist() != order


def test_order_is_pinned():
    """Checkpoints of earlier versions hold positions in this very order."""
    assert EpochPlan([3, 4, 2, 5], seed=7, epoch=2, global_batch=4, window=2).order.tolist() == [
        2, 3, 4, 0, 1, 6, 5, 10, 12, 9, 13, 11, 8, 7,
    ]  # fmt: skip


@NO_DEADLINE
@given(st.integers(1, 40), st.integers(0, 500), st.integers(0, 500))
def test_position_arithmetic(num_steps, done, more):
    position = BEGIN.after(done, num_steps)
    assert position.batches_before(num_steps) == done
    assert position.step < num_steps
    assert position.after(more, num_steps) == BEGIN.after(done + more, num_steps)
    assert (position < position.after(more, num_steps)) == (more > 0)


def test_the_end_of_an_epoch_is_the_beginning_of_the_next():
    assert Position(3, 9).after(1, 10) == Position(4, 0) == Position(3, 10).after(0, 10)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"global_batch": 11}, r"train.batch_size=11 is larger than the set \(10 samples\).*lower it to 10"),
        ({"global_batch": 0}, "needs samples and a batch"),
        ({"global_batch": 2, "last": "keep"}, 'data.last_batch=\'keep\'.*"drop" or "complete"'),
        ({"global_batch": 2, "window": 0}, "data.shuffle_window=0"),
    ],
)
def test_impossible_plans_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        EpochPlan([4, 6], seed=0, epoch=0, **arguments)


def test_unequal_shares_differ_by_one_and_impossible_ones_are_refused():
    plan = EpochPlan([4, 6], seed=0, epoch=0, global_batch=4)
    parts = [plan.rank_ids(0, rank, 3) for rank in range(3)]
    assert sorted(map(len, parts)) == [1, 1, 2]
    assert np.concatenate(parts).tolist() == plan.step_ids(0).tolist()
    with pytest.raises(ValueError, match="batch_size=4 has not even one sample for each of 5 workers"):
        plan.rank_ids(0, 0, 5)
    with pytest.raises(ValueError, match="rank=2 does not exist"):
        plan.rank_ids(0, 2, 2)
    with pytest.raises(IndexError):
        plan.step_ids(2)


def test_completing_may_repeat_a_small_set_more_than_once():
    plan = EpochPlan([3], seed=0, epoch=0, global_batch=8, last="complete")
    assert plan.num_steps == 1 == count_steps(3, 8, "complete")
    assert sorted(Counter(plan.step_ids(0).tolist()).values()) == [2, 3, 3]


def test_planning_imagenet_takes_a_fraction_of_a_second():
    started = time.process_time()  # not the wall clock: other tests run beside this one
    plan = EpochPlan([1000] * 1281, seed=0, epoch=0, global_batch=1024)
    plan.rank_ids(0, 0, 8)
    assert time.process_time() - started < 1  # 0.15 s when measured alone
