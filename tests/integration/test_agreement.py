"""A failure of one rank is a failure of all, with the same words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.ranks.agreement import agreed
from tests.harness import WorkerGroup

JOB = "tests.integration.agreement_cases:outcome"


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ({"1": "user"}, ("UserError", "data.jsonl:3: broken (on rank 1)")),
        ({"0": "user", "1": "user"}, ("UserError", "data.jsonl:3: broken")),
        ({"1": "transient"}, ("TransientError", "data.jsonl: away (on rank 1)")),
        ({"0": "transient", "1": "user"}, ("UserError", "data.jsonl:3: broken (on rank 1)")),
        ({"1": "internal"}, ("RuntimeError", "rank 1 failed: KeyError: 'lost'")),
    ],
)
def test_all_ranks_raise_what_one_met(
    distributed: Callable[[int], WorkerGroup], failing: dict[str, str], expected: tuple[str, str]
) -> None:
    assert [tuple(seen) for seen in distributed(2).run(JOB, failing=failing)] == [expected, expected]


def test_without_a_failure_each_rank_keeps_its_own_result(distributed: Callable[[int], WorkerGroup]) -> None:
    seen = distributed(2).run(JOB, failing={})
    assert [tuple(item) for item in seen] == [("result", "0"), ("result", "1")]


def test_before_there_are_ranks_it_simply_runs() -> None:
    def fails() -> None:
        raise UserError("no such file")

    assert agreed(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^no such file$"):
        agreed(fails)
