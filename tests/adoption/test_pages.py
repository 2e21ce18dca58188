"""The code of ``docs/adoption`` runs; that of Megatron-Bridge in ``test_bridge``, the script's diff in ``test_readme``."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.adoption.pages import PAGES, blocks
from tests.harness import WorkerGroup


def test_the_loop_of_the_page_resumes_as_if_undisturbed(distributed: Callable[[int], WorkerGroup]) -> None:
    attaching, loop, leaving = blocks("own-loop.md", "python")
    job = "tests.adoption.cases:page_of_own_loop"
    for result in distributed(2).run(job, attaching=attaching, loop=loop, leaving=leaving):
        assert all(result.values()), result


@pytest.mark.parametrize("page", sorted(page.name for page in PAGES.glob("*.md")))
def test_links_exist_and_flags_are_known(page: str) -> None:
    from megatron_ogpsa.integration.arguments.parser import build_parser

    text = (PAGES / page).read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (PAGES / path).exists(), path
    known = {option for action in build_parser()._actions for option in action.option_strings}
    launchers = {"--standalone", "--nproc-per-node", "--no-deps"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - launchers <= known
