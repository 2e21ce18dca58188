"""Passes of a model that is trained in FP8, with products in the 16-bit type of its parameters instead.

FP8 rounds to 3 or 2 bits of mantissa, so that a reference gradient in FP8 spans less of what it is to protect (docs/fp8.md
has how much). Reference passes are few, and can do without.

Megatron asks its configuration in each forward pass whether a layer is in FP8 (``core/fp8_utils.py``, ``get_fp8_context``),
and modules of Transformer Engine outside of that context multiply in the type of their input. Weights that are FP8 themselves
(``--fp8-param-gather``) they convert first: the rounded values, in 2 bytes for each local parameter while a pass lasts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import get_model_config

from megatron_ogpsa.attributes import attributes_set
from megatron_ogpsa.precision.fp8_state import quantizing_modules

CONVERTS_WEIGHTS = "You are using quantized weights without quantized compute"
"""How the warning of Transformer Engine begins that asks whether this is meant."""

LAST_PASS = ("fp8", "fp8_initialized")
"""What a module of Transformer Engine notes of its last forward pass, beside ``fp8_meta["fp8_checkpoint"]``. It decides
whether a checkpoint gets the module's scales."""


@contextmanager
def without_fp8(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Forward and backward passes inside take no layer in FP8; nothing to do for a model that is not trained in it."""
    modules = quantizing_modules(chunks)
    configs = _configs_in_fp8(chunks)
    settings: list[tuple[Any, str, Any]] = [(config, "fp8", None) for config in configs]
    # Routers pad tokens to the multiples that a recipe takes, which passes without one need not.
    settings += [(config, "moe_router_padding_for_quantization", False) for config in configs]
    # Gradients reach FP8 weights through the conversion, in which Transformer Engine loses sight of their main_grad.
    settings += [
        (module, "fuse_wgrad_accumulation", False)
        for module in modules
        if module.primary_weights_in_fp8 and hasattr(module, "fuse_wgrad_accumulation")
    ]
    settings += [(module, name, getattr(module, name)) for module in modules for name in LAST_PASS]
    checkpointed = [module.fp8_meta["fp8_checkpoint"] for module in modules]
    with warnings.catch_warnings(), attributes_set(settings):
        warnings.filterwarnings("ignore", CONVERTS_WEIGHTS)
        try:
            yield
        finally:
            for module, value in zip(modules, checkpointed, strict=True):
                module.fp8_meta["fp8_checkpoint"] = value


def _configs_in_fp8(chunks: Sequence[torch.nn.Module]) -> list[Any]:
    """Each object once: modules share one, but for those (attention, shared experts) that changed a copy."""
    configs = [get_model_config(chunk) for chunk in chunks]
    configs += [module.config for chunk in chunks for module in chunk.modules() if hasattr(module, "config")]
    return [*{id(config): config for config in configs if getattr(config, "fp8", None)}.values()]
