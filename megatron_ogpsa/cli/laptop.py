"""``megatron-ogpsa laptop``: see :mod:`megatron_ogpsa.laptop.run`."""

from __future__ import annotations

from megatron_ogpsa.laptop.run import add_arguments, run

__all__ = ["add_arguments", "run"]
