"""``megatron-ogpsa`` with refreshes on and projection off: what a refresh leaves behind would show in the training."""

from __future__ import annotations

import os
import sys
from typing import Any

from megatron_ogpsa.cli import launching, main

if "RANK" in os.environ:
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.plugin import ogpsa

    attach = ogpsa.attach

    def attach_disabled(*args: Any, **kwargs: Any) -> ogpsa.OGPSA:
        plugin = attach(*args, **kwargs)
        plugin.enabled = False
        return plugin

    ogpsa.attach = attach_disabled

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.unprojected"
    sys.exit(main.main())
