"""``megatron-ogpsa`` of which all ranks but those of the first node wait before step ``HOLD``, until they are ended.

They do so once: the last rank, which has printed Megatron's line of the step before then, says so in the file ``held``, and
ranks that find it go on. Rank 0 prints at its end which ranks its watch has heard of.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_ogpsa.cli import launching, main
from megatron_ogpsa.watchdog.link import Link
from megatron_ogpsa.watchdog.watch import Watch

HELD = Path("held")

if int(os.environ.get("GROUP_RANK", "0")) > 0 and not HELD.exists():
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.projection.run import ProjectionRun

    before_step = ProjectionRun.before_step

    def holding_before_step(self: Any, model: Any, optimizer: Any, forward_backward: Any, step: int) -> None:
        if step == int(os.environ["HOLD"]):
            if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                HELD.write_text(str(os.getpid()), encoding="utf-8")
            time.sleep(600)
            raise RuntimeError("nobody has ended this rank")
        before_step(self, model, optimizer, forward_backward, step)

    ProjectionRun.before_step = holding_before_step  # type: ignore[method-assign]

leave = Watch._leave


def telling_leave(self: Watch, link: Link) -> None:
    if self._rank == 0:
        print(f"heard of ranks {sorted(link.ask(lambda board: board.records()))}")
    leave(self, link)


Watch._leave = telling_leave  # type: ignore[method-assign]

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.holding"
    sys.exit(main.main())
