"""What clouds say when they take a machine back."""

from __future__ import annotations

import pytest
from metadata_service import Metadata

from zsr.launch.notice import seconds_left_aws, seconds_left_gcp, watch


def test_what_the_clouds_say_is_understood() -> None:
    with Metadata() as cloud:
        assert seconds_left_aws(cloud.address) is None
        assert seconds_left_gcp(cloud.address) is None
        cloud.take_away_in(110)
        left = seconds_left_aws(cloud.address)
        assert left is not None and 105 < left <= 110
        assert seconds_left_gcp(cloud.address) == 30
    with pytest.raises(OSError):
        seconds_left_aws(cloud.address)


def test_a_service_that_is_away_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[float | Exception | None] = [
        OSError("no route"),
        OSError("no route"),
        None,
        OSError("no route"),
        12.0,
    ]

    def ask() -> float | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert watch(ask, poll_s=0.0) == 12.0
    assert answers == []
    assert capsys.readouterr().out.count("no route") == 2  # once an outage
