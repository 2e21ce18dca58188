"""Runs ``megatron-ogpsa`` with several command lines, one after the other, in one process: importing takes seconds.

Standard input: a JSON list of command lines; standard output: a JSON list of [exit code, stdout, stderr].
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

from megatron_ogpsa.cli.main import main


def outcome(argv: list[str]) -> tuple[int, str, str]:
    """Of one command line, as a user would see it."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:  # argparse's own
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(json.dumps([outcome(argv) for argv in json.load(sys.stdin)]))
