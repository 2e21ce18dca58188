"""``megatron-ogpsa`` with context parallelism on the CPU: the attention of ``tests/core/context_parallel.py``.

In place of Transformer Engine's, which needs a GPU; with the refusals of what has no such attention lifted.
"""

from __future__ import annotations

import os
import sys

from megatron_ogpsa.cli import launching, main

if "RANK" in os.environ:
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron.core.models import backends

    from megatron_ogpsa.integration.arguments import cpu
    from megatron_ogpsa.integration.inputs import context_parallel
    from tests.core.context_parallel import GatheringAttention

    backends.DotProductAttention = GatheringAttention
    context_parallel.check_attention = lambda args: None
    cpu.WITHOUT_GPU = tuple(r for r in cpu.WITHOUT_GPU if r.flag != "--context-parallel-size")

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.split_sequences"
    sys.exit(main.main())
