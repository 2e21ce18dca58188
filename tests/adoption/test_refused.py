"""Each switch that a table refuses is refused when it is given, and a run without any is not."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from megatron_ogpsa.errors import UnsupportedError
from megatron_ogpsa.integration.arguments.cpu import check_supported_on_cpu
from megatron_ogpsa.integration.arguments.loop import check_loop_arguments
from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags
from megatron_ogpsa.integration.arguments.projection import check_projection_arguments
from megatron_ogpsa.integration.arguments.stage import check_arguments
from megatron_ogpsa.refusal import Refusal, refuse
from tests.adoption import refused_page

REFERENCE = ("--ogpsa-reference", "general=general.jsonl")
Check = Callable[[argparse.Namespace], object]

CHECKS: dict[str, tuple[tuple[str, ...], Check]] = {
    "By `megatron-ogpsa train`": ((), check_loop_arguments),
    "In DPO": (("--ogpsa-stage", "dpo", "--ogpsa-train-data", "pairs.jsonl"), check_arguments),
    "With references": (REFERENCE, check_projection_arguments),
    "With references, where updates are projected (the default)": (REFERENCE, check_projection_arguments),
    "Without a GPU": ((), partial(check_supported_on_cpu, for_training=True)),
}
"""Where it is refused → what goes with it, and what a run asks. The other tables are asked together with these."""


def switches() -> Iterator[tuple[str, Refusal]]:
    """Refusals of a flag by itself, whatever its value."""
    for where, table in refused_page.tables().items():
        yield from ((where, refusal) for refusal in table if refusal.applies is None)


def given(flag: str) -> list[str]:
    """The flag with a value that it takes."""
    (action,) = (action for action in build_parser()._actions if flag in action.option_strings)
    if action.nargs == 0:
        return [flag]
    value = str([*action.choices][-1]) if action.choices else "0.5" if action.type is float else "1"
    return [flag, *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]


@pytest.mark.parametrize(("where", "refusal"), [*switches()], ids=lambda one: getattr(one, "flag", one))
def test_a_switch_is_refused_by_its_name(where: str, refusal: Refusal) -> None:
    args = parse_flags(given(refusal.flag))
    with pytest.raises(UnsupportedError) as raised:
        refuse([refusal], args)
    assert str(raised.value).startswith(f"{refusal.flag} is not supported: ")
    assert str(raised.value).endswith(f"; {refusal.remedy}")
    assert not refusal.is_asked(parse_flags([]))
    if where in CHECKS:
        more, check = CHECKS[where]
        with pytest.raises(UnsupportedError, match=f"^{refusal.flag}"):
            check(parse_flags([*more, *given(refusal.flag)]))
