"""``megatron-ogpsa`` with refreshes on and projection off: what a refresh leaves behind would show in the training."""

from __future__ import annotations

import os
import sys
from typing import Any

from megatron_ogpsa.cli import launching, main

if "RANK" in os.environ:
    from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa import plugin

    attach = plugin.attach

    def attach_disabled(*args: Any, **kwargs: Any) -> plugin.OGPSA:
        ogpsa = attach(*args, **kwargs)
        ogpsa.enabled = False
        return ogpsa

    plugin.attach = attach_disabled

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.unprojected"
    sys.exit(main.main())
