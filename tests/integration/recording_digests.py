"""``megatron-ogpsa`` that records which rank hashed which file, and whether in its own process, in ``hashed.txt``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_ogpsa.cli import launching, main
from megatron_ogpsa.integration.runtime.patching import Patch, apply_patches

_PROCESS = os.getpid()


def _recording(original: Callable[[Path], str]) -> Callable[[Path], str]:
    def digest(path: Path) -> str:
        place = "rank" if os.getpid() == _PROCESS else "writer"
        with Path("hashed.txt").open("a", encoding="utf-8") as file:  # a line is appended as a whole
            file.write(f"{place} {os.environ['RANK']} {path.parent.name}/{path.name}\n")
        return original(path)

    return digest


if "RANK" in os.environ:
    reason = "who hashes what is seen nowhere else"
    apply_patches([Patch(target="megatron_ogpsa.checkpoints.manifest:_digest", reason=reason, replace=_recording)])

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.recording_digests"
    sys.exit(main.main())
