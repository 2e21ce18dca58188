"""How long training still takes: told every half minute, from the pace of the steps after the first."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_ogpsa.integration.loop.time_left import TimeLeft, in_words


def test_the_pace_leaves_the_first_step_out_and_lines_are_half_a_minute_apart() -> None:
    now = iter([500.0, 512.0, 524.0, 536.0, 548.0, 560.0, 572.0])  # after a first step that has taken long
    hook = TimeLeft(Namespace(train_iters=107), clock=lambda: next(now))
    lines = [hook.line(step) for step in range(1, 8)]
    assert lines == ["", "", "", " step 4 of 107, 12.0 s each: about 21 min to go", "", "", lines[6]]
    assert lines[6] == " step 7 of 107, 12.0 s each: about 20 min to go"


def test_at_the_end_and_without_an_end_nothing_is_told() -> None:
    for total in (3, None):
        now = iter([0.0, 100.0, 200.0])
        hook = TimeLeft(Namespace(train_iters=total), clock=lambda now=now: next(now))  # type: ignore[misc]
        lines = [hook.line(step) for step in (1, 2, 3)]
        assert lines[2] == ""
        assert bool(lines[1]) == bool(total)


@pytest.mark.parametrize(
    ("seconds", "words"), [(45.2, "45 s"), (720, "12 min"), (12_000, "3 h 20 min"), (191_000, "2 days 5 h")]
)
def test_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
