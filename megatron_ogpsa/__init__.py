"""Orthogonal gradient projection for safety alignment (OGPSA, arXiv:2602.07892) as a plugin for Megatron-Core.

    from megatron_ogpsa import OGPSAConfig, attach      # a megatron-core loop of your own
    from megatron_ogpsa import pretrain                 # in place of megatron.training's

Names are imported when they are used: on a machine without a GPU the CPU runtime must be installed before
``megatron.core`` is imported, and ``pretrain`` does that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ogpsa.config import OGPSAConfig
    from megatron_ogpsa.integration.arguments.parser import add_ogpsa_arguments
    from megatron_ogpsa.integration.training import pretrain
    from megatron_ogpsa.plugin.ogpsa import OGPSA, attach

__version__ = "0.1.0"

_HOMES = {
    "OGPSA": "megatron_ogpsa.plugin.ogpsa",
    "OGPSAConfig": "megatron_ogpsa.config",
    "add_ogpsa_arguments": "megatron_ogpsa.integration.arguments.parser",
    "attach": "megatron_ogpsa.plugin.ogpsa",
    "pretrain": "megatron_ogpsa.integration.training",
}

__all__ = ["OGPSA", "OGPSAConfig", "add_ogpsa_arguments", "attach", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megatron_ogpsa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
