"""How long a rank may wait, from the flags."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.loop.hang_watch import hang_timeout

GIVEN = Namespace(
    ogpsa_hang_timeout=None,
    distributed_timeout_minutes=10,
    distributed_timeout_seconds_after_init=None,
    enable_ft_package=False,
    inprocess_restart=False,
)

CASES = {
    "by default a bit before the process groups": ({}, 540),
    "of a longer timeout": ({"distributed_timeout_minutes": 60}, 3240),
    "which is shorter after the start": ({"distributed_timeout_seconds_after_init": 120}, 108),
    "as given": ({"ogpsa_hang_timeout": 30.0}, 30),
    "off": ({"ogpsa_hang_timeout": 0.0}, 0),
    "Megatron's package watches": ({"enable_ft_package": True}, 0),
    "Megatron restarts in the process": ({"inprocess_restart": True}, 0),
    "both, as given": ({"enable_ft_package": True, "ogpsa_hang_timeout": 30.0}, 30),
}


@pytest.mark.parametrize("case", CASES)
def test_timeout(case: str) -> None:
    changes, expected = CASES[case]
    assert hang_timeout(Namespace(**vars(GIVEN) | changes)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"ogpsa_hang_timeout": 600.0}, "--distributed-timeout-minutes 10"),
        (
            {"ogpsa_hang_timeout": 130.0, "distributed_timeout_seconds_after_init": 120},
            "--distributed-timeout-seconds-after-init 120",
        ),
    ],
)
def test_a_timeout_that_process_groups_come_before_is_refused(changes: dict[str, object], flag: str) -> None:
    with pytest.raises(UserError, match="--ogpsa-hang-timeout") as raised:
        hang_timeout(Namespace(**vars(GIVEN) | changes))
    assert flag in str(raised.value)
