"""What a refresh's passes promise beside leaving no trace (``tests/integration/test_train.py``)."""

from __future__ import annotations

from collections.abc import Callable

from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]


def test_a_reference_does_not_depend_on_those_before_it(distributed: Distributed) -> None:
    """Bitwise, though a pass draws random numbers and moves the bias by which experts are chosen."""
    for errors in distributed(2).run("tests.core.reference_cases:order_of_references", layout="ep2-dropout"):
        assert errors == {"0": 0.0, "1": 0.0, "2": 0.0}


def test_references_take_the_mean_over_tokens_whatever_training_takes(distributed: Distributed) -> None:
    """Their losses that balance experts too: these routers weigh on their own. fp32 rounding of other scales, 1e-7."""
    for error in distributed(2).run("tests.core.reference_cases:mean_of_training", layout="ep2-dropout"):
        assert error < 1e-6
