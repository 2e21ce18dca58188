"""The CPU runtime leaves other libraries' use of torch alone."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu
install_if_no_gpu()
with torch.device("meta"):
    made = [torch.arange(3), torch.ones(2), torch.tensor([1.0])]
raise SystemExit(0 if all(tensor.is_meta for tensor in made) and not torch.ones(1).is_meta else 1)
"""


def test_device_contexts_work_where_the_runtime_was_first() -> None:
    """In a process of its own: torch notes what a device context acts on when one is first used."""
    assert subprocess.run([sys.executable, "-c", PROGRAM], timeout=400, check=False).returncode == 0
