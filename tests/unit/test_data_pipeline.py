"""Batches: the plan's order with any number of workers, exact resume, faults that name the sample, no process left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_factory import encode_image, make_image, make_shards, write_index, write_tar

from zsr.data.pipeline import eval_batches, num_steps_per_epoch, subset_ids, train_batches
from zsr.data.plan import BEGIN, EpochPlan, Position
from zsr.data.shards import ShardSet

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("pipeline") / "set", num_samples=38, num_classes=5, shard_size=7)


@pytest.fixture
def shards(folder: Path) -> ShardSet:
    return ShardSet(folder)


def take(shards: ShardSet, count: int, **options) -> list:
    options = {"seed": 1, "global_batch": 8, "window": 2, "image_size": SIZE} | options
    batches = train_batches(shards, **options)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def assert_equal(one: list, other: list) -> None:
    assert [position for position, _ in one] == [position for position, _ in other]
    for (_, a), (_, b) in zip(one, other, strict=True):
        assert a.key == b.key
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)


def test_batches_are_what_the_plan_says(shards):
    num_steps = num_steps_per_epoch(shards, 8)
    assert num_steps == 4
    for number, (position, batch) in enumerate(take(shards, 10)):
        epoch, step = divmod(number, num_steps)
        ids = EpochPlan(shards.index.shard_sizes, 1, epoch, 8, window=2).step_ids(step)
        assert batch.key == [f"s{i:06d}" for i in ids]
        assert batch.label.tolist() == [i % 5 for i in ids]
        assert (batch.image.numpy()[3] == make_image(ids[3], SIZE, SIZE).transpose(2, 0, 1)).all()
        assert (batch.image.dtype, batch.label.dtype, len(batch)) == (torch.uint8, torch.int64, 8)
        assert position == Position(epoch, step).after(1, num_steps)


@pytest.mark.parametrize("last", ["drop", "complete"])
def test_workers_and_resume_do_not_change_the_stream(shards, last):
    straight = take(shards, 11, last=last)
    assert_equal(take(shards, 11, last=last, num_workers=2), straight)
    stop = straight[4][0]
    assert_equal(take(shards, 6, last=last, start=stop, num_workers=1), straight[5:])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 9), st.sampled_from(["drop", "complete"]))
def test_another_world_goes_on_with_exactly_the_remaining_samples(shards, world, later_world, stop, last):
    def keys(count, world_size, start=BEGIN):
        ranks = [take(shards, count, last=last, rank=r, world_size=world_size, start=start) for r in range(world_size)]
        return [[key for rank in ranks for key in rank[step][1].key] for step in range(count)]

    start = BEGIN.after(stop, num_steps_per_epoch(shards, 8, last))
    assert keys(stop, world) + keys(10 - stop, later_world, start) == keys(10, 1)


def test_the_loader_leaves_torchs_random_numbers_alone(shards):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    take(shards, 2, num_workers=1)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_sample_once_in_order(shards, num_workers):
    whole = list(eval_batches(shards, image_size=SIZE, batch_size=9, num_workers=num_workers))
    assert [len(batch) for batch in whole] == [9, 9, 9, 9, 2]
    assert [key for batch in whole for key in batch.key] == [f"s{i:06d}" for i in range(38)]
    ranks = [
        [
            key
            for batch in eval_batches(shards, image_size=SIZE, batch_size=4, rank=r, world_size=3)
            for key in batch.key
        ]
        for r in range(3)
    ]
    assert ranks == [[f"s{i:06d}" for i in range(r, 38, 3)] for r in range(3)]


def test_the_evaluation_subset_is_fixed_and_grows():
    small, large = subset_ids(1000, 50), subset_ids(1000, 200)
    assert (len(small), len(large)) == (50, 200)
    assert set(small) < set(large)
    assert (np.diff(large) > 0).all()
    assert subset_ids(10, 0).tolist() == subset_ids(10, 10).tolist() == subset_ids(10, 99).tolist() == list(range(10))
    assert len(subset_ids(1, 1)) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"cls": b"0", "png": b"\x89PNG no"}, "the image cannot be decoded"),
        ({"cls": b"9", "png": encode_image(make_image(0, 8, 8), "png")}, "label 9 is none of the set's 1 classes"),
        ({"png": encode_image(make_image(0, 8, 8), "png")}, "no cls part"),
        ({"cls": b"0"}, "no image among the parts"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, num_workers, parts, sentence):
    good = {"cls": b"0", "png": encode_image(make_image(0, 8, 8), "png")}
    entries = [
        write_tar(tmp_path / "good.tar", [("fine", good)]),
        write_tar(tmp_path / "bad.tar", [("fine", good), ("ill", parts)]),
    ]
    shards = ShardSet(write_index(tmp_path, entries, [0, 0, 0], 1))
    with pytest.raises(ValueError, match=f"sample 'ill' in shard bad.tar of .*: .*{sentence}") as caught:
        list(eval_batches(shards, image_size=8, batch_size=1, num_workers=num_workers))
    assert "Traceback" not in str(caught.value)


def test_impossible_batches_are_refused_at_the_call(shards):
    with pytest.raises(ValueError, match="batch_size=8 cannot be shared equally by 3 workers"):
        train_batches(shards, seed=0, global_batch=8, image_size=SIZE, world_size=3)
    with pytest.raises(ValueError, match=r"larger than the set \(38 samples\)"):
        train_batches(shards, seed=0, global_batch=64, image_size=SIZE)
    with pytest.raises(ValueError, match="batch_size=0"):
        eval_batches(shards, image_size=SIZE, batch_size=0)


def test_closing_ends_the_workers(shards):
    before = set(multiprocessing.active_children())
    batches = train_batches(shards, seed=0, global_batch=8, image_size=SIZE, num_workers=2)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_start_from_a_thread_and_end_despite_the_trainers_handlers(shards):
    """Ray Train runs the loop in a thread, and the loop's process catches SIGTERM: it means preemption there."""
    answers: list = []
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        thread = threading.Thread(target=lambda: answers.extend(take(shards, 5, num_workers=2)))
        thread.start()
        thread.join(120)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not thread.is_alive()
    assert_equal(answers, take(shards, 5))


def test_a_lock_held_while_forking_does_not_stop_the_workers(shards):
    """A thread may be opening a shard when the loader forks: the workers must not inherit the locked lock."""
    with shards._lock:
        batches = train_batches(shards, seed=0, global_batch=8, image_size=SIZE, num_workers=1)
        assert len(next(batches)[1]) == 8
        batches.close()


def _lose_a_worker(folder: Path) -> None:
    """Exit with 7 if the loss is reported."""
    try:
        batches = train_batches(ShardSet(folder), seed=0, global_batch=8, image_size=SIZE, num_workers=1)
        next(batches)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        for _ in batches:
            pass
    except RuntimeError as fault:
        os._exit(7 if "DataLoader worker" in str(fault) else 8)


def test_a_killed_worker_is_an_error_and_not_a_hang(folder):
    # In a process of its own: torch reports the loss from a signal handler, wherever the main thread is at that moment.
    process = multiprocessing.get_context("fork").Process(target=_lose_a_worker, args=(folder,))
    process.start()
    process.join(120)
    assert process.exitcode == 7
