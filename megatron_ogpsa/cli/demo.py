"""``megatron-ogpsa demo``: see :mod:`megatron_ogpsa.demo.run`."""

from __future__ import annotations

from megatron_ogpsa.demo.run import add_arguments, run

__all__ = ["add_arguments", "run"]
