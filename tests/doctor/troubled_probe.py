"""The probe of a rank that has the trouble of ``TROUBLE``: ``RANK STEP stops`` or ``RANK STEP crashes``."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_ogpsa.doctor import probe

RANK, STEP, HOW = os.environ["TROUBLE"].split()

make_group = probe._group


def _in_trouble(step: str) -> None:
    if (os.environ["RANK"], step) == (RANK, STEP):
        if HOW == "crashes":
            sys.exit("its libraries are broken")
        os.kill(os.getpid(), signal.SIGSTOP)


def _group(axis: str) -> Any:
    _in_trouble(axis)
    return make_group(axis)


if __name__ == "__main__":
    _in_trouble("start")
    probe._group = _group
    probe.main(sys.argv[1])
