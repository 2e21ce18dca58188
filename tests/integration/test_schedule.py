"""When references are refreshed: arithmetic, and what a resumed run has to know."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from itertools import accumulate, chain, repeat

import pytest

from megatron_ogpsa.config import OGPSAConfig
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.projection.schedule import RefreshSchedule, adapted
from megatron_ogpsa.references.steps import early_refreshes, next_refresh
from tests.harness import WorkerGroup

EARLY = [1, 2, 4, 6, 9, 12, 16, 20]
"""Of an interval of 30 steps."""

Share = Callable[[int], float]
"""What a basis of so many steps ago still holds."""


def half_lost_in(steps: int) -> Share:
    """Of a gradient that turns steadily: the square of its angle is lost."""
    return lambda age: max(0.0, 1 - 0.5 * (age / steps) ** 2)


def run(
    schedule: RefreshSchedule, share: Share, first: int, last: int, saves: int | None = None
) -> list[tuple[int, str, int]]:
    """(step, what is refreshed, the interval then) of a run; as the loop calls the schedule."""
    refreshed, made = [], 0
    for step in range(first, last):
        if step == first or (saves and step % saves == 0) or schedule.is_of_all(step):
            schedule.restart(step)
            refreshed.append((step, "all", schedule.interval))
            made = step
        elif schedule.is_due(step):
            turn = schedule.turn
            schedule.advance(step, share(step - made))
            refreshed.append((step, str(turn), schedule.interval))
            made = step
    return refreshed


def test_by_one_interval_refreshes_stand_at_multiples_whatever_else_asks_for_one() -> None:
    steps = [step for step, *_ in run(RefreshSchedule(4), half_lost_in(1), 0, 20, saves=6)]
    assert steps == [0, 4, 6, 8, 12, 16, 18]
    assert [step for step, *_ in run(RefreshSchedule(4), half_lost_in(1), 6, 20, saves=6)] == steps[2:]


def test_early_ones_come_before_the_first_multiple_at_the_steps_that_a_loop_is_told() -> None:
    """A loop of one's own and Bridge's callback ask the configuration, Megatron's the schedule."""
    steps = [step for step, *_ in run(RefreshSchedule(30, early=True), half_lost_in(1), 0, 100, saves=40)]
    assert steps == [0, 1, 2, 4, 6, 9, 12, 16, 20, 30, 40, 60, 80, 90]
    config = OGPSAConfig(refresh_interval=30)
    assert [step for step in range(100) if config.refreshes_at(step)] == [0, *EARLY, 30, 60, 90]
    config = OGPSAConfig(refresh_interval=30, early_refreshes=False)
    assert [step for step in range(100) if config.refreshes_at(step)] == [0, 30, 60, 90]
    assert str(RefreshSchedule(30, early=True)) == "refreshed every 30 steps, and after 1, 2, 4, 6, 9, 12, 16, 20"


@pytest.mark.parametrize(
    ("interval", "early"),
    [
        (1, []),
        (2, [1]),
        (3, [1, 2]),
        (5, [1, 2]),
        (8, [1, 2, 4]),
        (10, [1, 2, 4, 6]),
        (30, EARLY),
        (40, [*EARLY, 25]),
        (67, [*EARLY, 25, 50]),
        (400, [*EARLY, 25, 50, 100, 200]),
    ],
)
def test_early_ones_come_ever_further_apart_and_none_is_near_the_first_multiple(
    interval: int, early: list[int]
) -> None:
    assert early_refreshes(interval, early=True) == early
    assert early_refreshes(interval, early=False) == []
    assert len(early_refreshes(10**12, early=True)) == 43  # as for "never": no list of all steps
    steps = [0]
    while steps[-1] < 3 * interval:
        steps.append(next_refresh(steps[-1], interval, early=True))
    assert steps == [0, *early, interval, 2 * interval, 3 * interval]
    for step in range(3 * interval):  # also from between them, where a checkpoint was
        assert next_refresh(step, interval, early=True) == next(later for later in steps if later > step)


def test_a_warm_up_refreshes_before_each_of_its_steps() -> None:
    """And early ones go on from there."""
    config = OGPSAConfig(refresh_interval=30, refresh_warmup=5)
    asked = [step for step in range(70) if config.refreshes_at(step)]
    assert asked == [0, 1, 2, 3, 4, 6, 9, 12, 16, 20, 30, 60]
    schedule = RefreshSchedule(30, early=True, warmup=5)
    assert [step for step, *_ in run(schedule, half_lost_in(1), 0, 70)] == asked
    assert str(schedule) == "refreshed every 30 steps, before each of the first 5, and after 6, 9, 12, 16, 20"
    longer = OGPSAConfig(refresh_interval=4, early_refreshes=False, refresh_warmup=7)
    assert [step for step in range(13) if longer.refreshes_at(step)] == [0, 1, 2, 3, 4, 5, 6, 8, 12]
    assert early_refreshes(4, early=False, warmup=7) == [1, 2, 3, 4, 5, 6]
    in_turns = [what for _, what, _ in run(RefreshSchedule(4, turns=2, warmup=7), half_lost_in(1), 0, 12)]
    assert in_turns == ["all"] * 7 + ["0", "1"]  # those of the warm-up are of all; then after 8 and 10 steps
    with pytest.raises(UserError, match=r"^refresh_warmup=-1: use 0 or more"):
        OGPSAConfig(refresh_warmup=-1)


def test_early_ones_are_of_all_references_and_turns_begin_anew() -> None:
    schedule = RefreshSchedule(30, turns=3, early=True)
    refreshed = [(step, what) for step, what, _ in run(schedule, half_lost_in(1), 0, 55)]
    assert refreshed == [*((step, "all") for step in (0, *EARLY)), (30, "0"), (40, "1"), (50, "2")]
    assert str(schedule) == "one refreshed every 10 steps, in turns, and all after 1, 2, 4, 6, 9, 12, 16, 20"


@pytest.mark.parametrize(
    ("captured", "expected"),
    [(0.1, 15), (0.79, 15), (0.8, 30), (0.94, 30), (0.96, 60), (1.0, 60)],
)
def test_half_below_the_bound_and_double_far_above_it(captured: float, expected: int) -> None:
    assert adapted(30, captured, bound=0.8, shortest=1, longest=100) == expected


def test_the_interval_stays_between_a_step_and_what_was_asked_for() -> None:
    falling = list(accumulate(repeat(0.0, 6), lambda n, share: adapted(n, share, 0.8, 1, 30), initial=30))
    assert falling == [30, 15, 7, 3, 1, 1, 1]
    rising = list(accumulate(repeat(1.0, 6), lambda n, share: adapted(n, share, 0.8, 1, 30), initial=1))
    assert rising == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("bound", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("steps", [1, 3, 10, 25, 100])
def test_it_settles_where_the_bound_holds(bound: float, steps: int) -> None:
    """Steady turning is the worst that hysteresis must stand: what loses less evenly loses less by doubling."""
    share = half_lost_in(steps)
    intervals = [interval for *_, interval in run(RefreshSchedule(64, bound=bound), share, 0, 2000)]
    assert len(set(intervals[-8:])) == 1
    assert share(intervals[-1]) >= bound or intervals[-1] == 1
    assert share(2 * intervals[-1]) < 1 - (1 - bound) / 4 or intervals[-1] == 64  # and no shorter than it must be


def test_it_lengthens_again() -> None:
    schedule = RefreshSchedule(16, bound=0.8)
    run(schedule, half_lost_in(3), 0, 100)
    assert schedule.interval == 1
    run(schedule, half_lost_in(1000), 100, 200)
    assert schedule.interval == 16


def test_it_begins_with_every_step_and_lengthens_as_the_basis_lasts() -> None:
    """Adam's first steps are its longest."""
    refreshed = run(RefreshSchedule(16, bound=0.8), lambda age: 1.0, 0, 64)
    assert [(step, interval) for step, _, interval in refreshed][:6] == [
        (0, 1),
        (1, 2),
        (3, 4),
        (7, 8),
        (15, 16),
        (31, 16),
    ]
    in_turns = [step for step, *_ in run(RefreshSchedule(16, turns=3, bound=0.8), lambda age: 1.0, 0, 20)]
    assert in_turns[:8] == [0, 1, 2, 3, 5, 7, 9, 13]


def test_turns_are_evenly_spread_and_all_are_refreshed_at_a_checkpoint() -> None:
    refreshed = [(step, what) for step, what, _ in run(RefreshSchedule(10, turns=3), half_lost_in(1), 0, 25, saves=20)]
    assert refreshed == [(0, "all"), (4, "0"), (8, "1"), (12, "2"), (16, "0"), (20, "all"), (24, "0")]


def test_a_round_decides_by_what_was_held_least() -> None:
    schedule = RefreshSchedule(12, turns=3, bound=0.8)
    schedule.restore({"interval": 12})
    schedule.restart(0)
    for step, captured in ((4, 0.99), (8, 0.5), (12, None)):
        assert schedule.interval == 12
        schedule.advance(step, captured)
    assert (schedule.interval, schedule.spacing) == (6, 2)
    for step in range(14, 32, 2):
        schedule.advance(step, 0.0)
    assert (schedule.interval, schedule.spacing) == (3, 1)  # a round of three references takes three steps


def test_nothing_is_decided_by_what_is_not_known() -> None:
    schedule = RefreshSchedule(12, bound=0.8)
    schedule.restore({"interval": 12})
    schedule.advance(12, None)
    assert schedule.interval == 12


def test_what_was_not_finite_is_tried_again() -> None:
    schedule = RefreshSchedule(4, turns=2)
    schedule.restart(0)
    schedule.postpone(2)
    assert (schedule.turn, [schedule.is_due(step) for step in (3, 4)]) == (0, [False, True])


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize(
    ("bound", "early", "warmup"), [(None, False, 0), (None, True, 0), (None, True, 8), (0.6, False, 0)]
)
def test_a_resumed_run_refreshes_as_the_undisturbed_one(
    turns: int, bound: float | None, early: bool, warmup: int
) -> None:
    """From any of its checkpoints, knowing no more than what they keep."""
    draw = random.Random(0)
    shares = [draw.random() for _ in range(500)]
    for interval, saves in ((1, 5), (4, 5), (7, 10), (12, 50), (30, 35)):
        states: dict[int, Mapping[str, int]] = {}
        whole, expected = RefreshSchedule(interval, turns=turns, bound=bound, early=early, warmup=warmup), []
        for start in range(0, 200, saves):
            states[start] = whole.state()
            expected.append(run(whole, lambda age: shares[age], start, min(start + saves, 200)))
        for start, state in states.items():
            resumed = RefreshSchedule(interval, turns=turns, bound=bound, early=early, warmup=warmup)
            resumed.restore(state)
            refreshed = run(resumed, lambda age: shares[age], start, 200, saves)
            assert refreshed == [*chain.from_iterable(expected[start // saves :])], (interval, saves, start)


def test_a_longer_interval_than_was_asked_for_is_not_restored() -> None:
    schedule = RefreshSchedule(8, bound=0.5)
    schedule.restore({"interval": 30})
    assert schedule.interval == 8
    schedule.restore({})  # of a run whose interval was fixed
    assert schedule.interval == 1


def test_ranks_that_round_differently_decide_alike(distributed: Callable[[int], WorkerGroup]) -> None:
    """The least share of all ranks; NaN, of a gradient that is zero, is no share."""
    for result in distributed(2).run("tests.integration.schedule_cases:decided"):
        assert result == {"least": 0.25, "of parts": 0.75, "unknown": None, "zero": 0.5}
