"""The probe of a rank that has the trouble of ``TROUBLE`` before a step: ``RANK STEP stops`` or ``RANK STEP crashes``."""

from __future__ import annotations

import os
import signal
import sys

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from megatron_ogpsa.doctor import probe

RANK, STEP, HOW = os.environ["TROUBLE"].split()


class Reports(PrefixStore):  # type: ignore[misc]
    """Where ranks tell that they begin a step; the one in trouble does not get so far."""

    def set(self, key: str, value: str) -> None:
        if key == f"{STEP}/begun/{RANK}":
            if HOW == "crashes":
                os.write(2, b"its libraries are broken\n")
                os._exit(3)
            os.kill(os.getpid(), signal.SIGSTOP)
        super().set(key, value)


if __name__ == "__main__":
    probe.PrefixStore = Reports
    probe.main(sys.argv[1])
