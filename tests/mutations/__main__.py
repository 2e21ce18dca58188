"""``python -m tests.mutations``: break the code in every way of the table and see whether the tests notice."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from tests.mutations.mutation import Mutation
from tests.mutations.report import Report, write_json_report, write_markdown
from tests.mutations.running import CopyError, Outcome, check_unbroken, copied_project, try_mutation
from tests.mutations.table import MUTATIONS


def main(arguments: Sequence[str] | None = None, mutations: Sequence[Mutation] = MUTATIONS) -> int:
    """Returns 0 if every mutation is caught, else 1."""
    options = _parser(mutations).parse_args(arguments)
    chosen = [mutation for mutation in mutations if not options.only or mutation.name in options.only]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name:32} {mutation.why}")
        return 0
    started = time.monotonic()
    try:
        outcomes = _try_all(chosen, options.jobs)
    except CopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = Report(chosen, outcomes, seconds=time.monotonic() - started)
    if options.json:
        write_json_report(options.json, report)
    if options.markdown:
        write_markdown(options.markdown, report)
    for outcome in report.not_caught:
        print(f"{outcome.verdict}: {outcome.name}: {outcome.evidence} ({outcome.test})")
    print(report.summary)
    return 1 if report.not_caught else 0


def _try_all(mutations: Sequence[Mutation], jobs: int) -> list[Outcome]:
    """The outcomes in the order of ``mutations``, of which ``jobs`` are tried side by side, each in a copy of its own."""
    with ExitStack() as stack:
        copies: SimpleQueue[Path] = SimpleQueue()
        for _ in range(jobs):
            copies.put(stack.enter_context(copied_project()))
        started = time.monotonic()
        number = check_unbroken(first := copies.get(), mutations)
        copies.put(first)
        print(f"unbroken: {number} selections of tests pass, {time.monotonic() - started:.0f} s", flush=True)

        def attempt(mutation: Mutation) -> Outcome:
            copy = copies.get()
            try:
                return try_mutation(copy, mutation)
            finally:
                copies.put(copy)

        started = time.monotonic()
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # whoever ends this waits for those that run
        attempts = {pool.submit(attempt, mutation): mutation.name for mutation in mutations}
        for index, done in enumerate(as_completed(attempts), start=1):
            outcome = done.result()
            left = (time.monotonic() - started) / index * (len(mutations) - index)
            print(
                f"[{index:{len(str(len(mutations)))}}/{len(mutations)}] {outcome.verdict:8} {outcome.name}: "
                f"{outcome.test}: {outcome.evidence} ({outcome.seconds:.0f} s; about {left:.0f} s left)",
                flush=True,
            )
        return [done.result() for done in attempts]


def _parser(mutations: Sequence[Mutation]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations",
        description="Break a copy of the project in one place after the other; each time tests must fail.",
    )
    names = [mutation.name for mutation in mutations]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="these mutations alone")
    jobs = range(1, 9)
    parser.add_argument("--jobs", type=int, choices=jobs, default=1, metavar="N", help="side by side (default: 1)")
    parser.add_argument("--list", action="store_true", help="show the mutations and run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as data")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the results as a page")
    return parser


if __name__ == "__main__":
    # Without a handler the copies would stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
