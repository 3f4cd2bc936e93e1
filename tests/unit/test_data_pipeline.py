"""Batches: the plan's order with any number of workers, exact resume, faults that name the sample, no process left."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_factory import encode_image, make_image, make_shards, write_index, write_tar

from zsr.data import workers
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


@st.composite
def interrupted_runs(draw):
    """A set's shard sizes, a batch, and a run in pieces: world size, loader processes and steps of each."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    global_batch = 12  # shared by 1, 2, 3, 4 or 6 ranks
    last = draw(st.sampled_from(["drop", "complete"])) if sum(sizes) >= global_batch else "complete"
    piece = st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 2), st.integers(0, 4))
    pieces = draw(st.lists(piece, min_size=1, max_size=3))
    return sizes, global_batch, last, draw(st.integers(1, 4)), draw(st.integers(0, 2**32)), pieces


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(interrupted_runs())
def test_any_worlds_workers_sizes_and_interruptions_give_the_plans_order(tmp_path_factory, run):
    sizes, global_batch, last, window, seed, pieces = run
    shards = ShardSet(make_shards(tmp_path_factory.mktemp("any") / "set", shard_size=sizes, image_size=8))
    num_steps = num_steps_per_epoch(shards, global_batch, last)
    options = {"seed": seed, "global_batch": global_batch, "last": last, "window": window, "image_size": 8}
    position, seen = BEGIN, []
    for world, num_workers, steps in pieces:
        ranks = [
            take(shards, steps, rank=r, world_size=world, num_workers=num_workers * (r == 0), start=position, **options)
            for r in range(world)
        ]
        for step in range(steps):
            assert len({rank[step][0] for rank in ranks}) == 1
            seen.append([key for rank in ranks for key in rank[step][1].key])
            position = ranks[0][step][0]
    for number, keys in enumerate(seen):
        epoch, step = divmod(number, num_steps)
        ids = EpochPlan(sizes, seed, epoch, global_batch, last, window).step_ids(step)
        assert keys == [f"s{i:06d}" for i in ids]


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
    with pytest.raises(ValueError, match="batch_size=2 has not even one sample for each of 3 workers"):
        train_batches(shards, seed=0, global_batch=2, image_size=SIZE, world_size=3)
    with pytest.raises(ValueError, match=r"larger than the set \(38 samples\)"):
        train_batches(shards, seed=0, global_batch=64, image_size=SIZE)
    with pytest.raises(ValueError, match="batch_size=0"):
        eval_batches(shards, image_size=SIZE, batch_size=0)


def test_closing_ends_the_workers(shards):
    for batches in (
        train_batches(shards, seed=0, global_batch=8, image_size=SIZE, num_workers=2),
        eval_batches(shards, batch_size=2, image_size=SIZE, num_workers=2),
    ):
        before = set(multiprocessing.active_children())
        next(batches)
        children = set(multiprocessing.active_children()) - before
        assert len(children) == 2
        batches.close()
        assert not any(child.is_alive() for child in children)


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


# Death of a worker, and of its parent. Each case runs in a process of its own, so that a hang fails it and no other.

BATCH = np.arange(4)


def run_apart(target: Callable[..., None], *args: Any, seconds: float = 30) -> None:
    """``target(*args)`` in a forked process; fails if it raises or is not back in time."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(seconds)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    assert not hung, "hung"
    assert process.exitcode == 0


def has_ended(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"  # an orphan may wait for an init that does not reap


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def fill_ids(ids: np.ndarray, image: np.ndarray, label: np.ndarray) -> list[str]:
    image[:], label[:] = 1, ids
    return [str(i) for i in ids]


def ahead(fill: workers.Fill, requests: Iterable[tuple[Any, np.ndarray]] | None = None, num_workers: int = 1) -> Any:
    requests = zip(count(), repeat(np.arange(4))) if requests is None else requests
    return workers.fill_ahead(fill, requests, num_workers=num_workers, batch_size=4, image_size=8)


def use_up(batches: Iterable[Any], in_step_s: float = 0) -> None:
    for _ in batches:
        time.sleep(in_step_s)


def shared_number() -> np.ndarray:
    """One int64 that is the same in processes forked later."""
    return np.frombuffer(mmap.mmap(-1, 8), np.int64)


def _lose_a_worker(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    num_workers, before_kill_s, in_step_s = rng.choice([1, 2, 3]), rng.uniform(0, 0.1), rng.choice([0, 0.005])

    def kill_one() -> None:
        wait_for(lambda: len(multiprocessing.active_children()) == num_workers)
        time.sleep(before_kill_s)
        rng.choice(multiprocessing.active_children()).kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    batches = train_batches(ShardSet(folder), seed=seed, global_batch=8, image_size=64, num_workers=num_workers)
    with pytest.raises(RuntimeError, match=r"killed by signal 9 .* memory ran out: lower data\.num_workers"):
        use_up(batches, in_step_s)
    killer.join()
    assert not multiprocessing.active_children()  # nor do the others stay


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_worker_is_an_error_and_not_a_hang(folder, seed):
    run_apart(_lose_a_worker, folder, seed)


def _lose_a_worker_in_an_answer() -> None:
    num_filled, nobody_reads = shared_number(), shared_number()

    def fill(*_: np.ndarray) -> list[str]:
        num_filled[0] += 1
        if num_filled[0] == 1:
            return ["first"]
        wait_for(lambda: nobody_reads[0] == 1)  # a reader that still waits would take this answer along
        return ["k" * 1_000_000] * 4  # far more than a pipe holds, so that it waits there for its reader

    batches = ahead(fill)
    next(batches)
    nobody_reads[0] = 1
    time.sleep(0.3)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RuntimeError, match="killed by signal 9"):
        next(batches)


def test_a_worker_killed_in_the_middle_of_an_answer_is_an_error():
    run_apart(_lose_a_worker_in_an_answer)


def _lose_a_worker_whose_pipes_stay_open() -> None:
    heir = shared_number()

    def fill(*_: np.ndarray) -> list[str]:
        child = os.fork()
        if child:
            heir[0] = child
        time.sleep(60)
        os._exit(0)

    killer = threading.Thread(
        target=lambda: wait_for(lambda: heir[0] != 0) and multiprocessing.active_children()[0].kill()
    )
    killer.start()
    try:
        with pytest.raises(RuntimeError, match="killed by signal 9"):
            next(ahead(fill))
        assert not has_ended(heir[0])
    finally:
        os.kill(heir[0], signal.SIGKILL)


def test_a_death_is_noticed_while_another_process_holds_the_pipes():
    """A process forked by someone else between the making of a worker's pipes and their closing in this process."""
    run_apart(_lose_a_worker_whose_pipes_stay_open)


def _stall_a_worker() -> None:
    workers.WORKER_TIMEOUT_S = 0.3
    batches = ahead(fill_ids)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"has given no batch for 0\.3 s"):
        use_up(batches)
    assert has_ended(worker.pid)


def test_a_stalled_worker_is_an_error():
    run_apart(_stall_a_worker)


def test_a_worker_that_leaves_by_itself_is_an_error():
    with pytest.raises(RuntimeError, match=r"data worker 0 of 1 \(pid \d+\) ended with exit code 3"):
        next(ahead(lambda *_: os._exit(3)))


def test_an_unforeseen_fault_keeps_its_type_and_says_where_it_was():
    with pytest.raises(KeyError) as caught:
        next(ahead(lambda *_: {}["no such key"]))
    assert "in data worker 0 of 1" in caught.value.__notes__[0]
    assert "test_data_pipeline.py" in caught.value.__notes__[0]


def test_workers_answer_signals_in_their_own_way():
    """Ctrl-C goes to the whole group and is the trainer's to handle; SIGTERM ends a worker whatever the trainer makes of it."""
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        batches = ahead(fill_ids)
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGINT)
        assert [next(batches)[0] for _ in range(5)] == [1, 2, 3, 4, 5]
        os.kill(worker.pid, signal.SIGTERM)
        with pytest.raises(RuntimeError, match="killed by signal 15"):
            use_up(batches)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _sleep(*_: np.ndarray) -> list[str]:
    time.sleep(60)
    return []


def _work_and_tell(pids: Connection) -> None:
    def tell() -> None:
        wait_for(lambda: len(multiprocessing.active_children()) == 2)
        pids.send([worker.pid for worker in multiprocessing.active_children()])

    threading.Thread(target=tell).start()
    next(ahead(_sleep, num_workers=2))


def test_workers_do_not_outlive_a_killed_parent():
    mine, theirs = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=_work_and_tell, args=(theirs,))
    parent.start()
    assert mine.poll(20)
    pids = mine.recv()
    assert len(pids) == 2
    time.sleep(0.2)  # by now they are asleep over their first batch, and read no pipe
    assert not any(has_ended(pid) for pid in pids)
    parent.kill()
    parent.join()
    assert wait_for(lambda: all(has_ended(pid) for pid in pids), seconds=10)


def test_closing_does_not_wait_for_the_batch_in_hand():
    requests = [(tag, np.full(4, tag)) for tag in range(6)]
    batches = ahead(lambda ids, *rest: fill_ids(ids, *rest) if ids[0] < 1 else _sleep(), requests, num_workers=2)
    next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 2
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 5
    assert all(has_ended(child.pid) for child in children)


def test_requests_are_drawn_here_and_a_few_ahead():
    drawn, num_filled = [], shared_number()

    def requests() -> Iterator[tuple[int, np.ndarray]]:
        for tag in range(100):
            drawn.append(tag)
            yield tag, np.arange(4)

    def fill(*arrays: np.ndarray) -> list[str]:
        num_filled[0] += 1
        return fill_ids(*arrays)

    batches = ahead(fill, requests())
    for taken in range(1, 8):
        tag, image, label, keys = next(batches)
        assert tag == taken - 1
        assert (image.eq(1).all(), label.tolist(), keys) == (True, [0, 1, 2, 3], ["0", "1", "2", "3"])
        assert len(drawn) == taken + workers.SLOTS
        assert wait_for(lambda ready=taken + workers.SLOTS: num_filled[0] == ready)  # nobody waits for the next call
    batches.close()


def test_a_batch_is_not_touched_by_later_ones():
    requests = [(tag, np.full(4 - tag % 2, tag)) for tag in range(30)]  # shorter ones in between
    for tag, image, label, keys in list(ahead(fill_ids, requests, num_workers=3)):
        assert label.tolist() == [tag] * len(keys) == [int(key) for key in keys]
        assert len(image) == len(keys) == 4 - tag % 2
