"""``megatron-ogpsa study``: see :mod:`megatron_ogpsa.study.run`."""

from __future__ import annotations

from megatron_ogpsa.study.run import add_arguments, run

__all__ = ["add_arguments", "run"]
