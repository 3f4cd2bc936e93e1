"""The numbers that zsr eval shows while it measures."""

from __future__ import annotations

import pytest

from zsr.eval.card import Share
from zsr.eval.runner import Moment


def test_the_interval_at_a_stages_end_is_the_tables_and_before_it_no_narrower():
    table = Share.of(30, 200)
    end = Moment("pgd", done=80, total=80, over=50, entered=80, samples=200).so_far
    assert (end.value, end.low, end.high) == pytest.approx((table.value, table.low, table.high))
    half = Moment("pgd", done=40, total=80, over=25, entered=80, samples=200).so_far
    assert half.value == pytest.approx(table.value)
    as_much_seen = Share.of(15, 100)  # 40 of the 80 that entered stand for 100 of 200
    assert (half.low, half.high) == pytest.approx((as_much_seen.low, as_much_seen.high))
    assert half.low < table.low and half.high > table.high


def test_nothing_seen_and_nothing_entered_have_an_interval_too():
    for moment in (Moment("pgd", 0, 9, 0, 9, 20), Moment("pgd", 0, 0, 0, 0, 20), Moment("clean", 20, 20, 20, 20, 20)):
        share = moment.so_far
        assert 0 <= share.low <= share.value <= share.high <= 1
