"""One pass of reference data through Megatron: what it is to find, and what it leaves behind, which is its gradient alone.

Whatever else a forward and backward pass changes (random states, router statistics, FP8 scales, timers, the watch on NaN) is
put back by :func:`no_trace`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_ogpsa.attributes import attributes_set
from megatron_ogpsa.precision.fp8_state import fp8_state_kept

LARGEST_LOGITS = "current_max_attn_logits"
"""Where attention keeps them until the step is over (``core/extensions/transformer_engine.py``)."""


@contextmanager
def reference_pass(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """A pass inside gives the gradient of the mean over all tokens, whatever training takes, and leaves no trace.

    For chunks that were built without ``calculate_per_token_loss`` Megatron scales gradients for a mean over ranks, which a
    mean over all tokens is already.
    """
    is_per_token = get_model_config(chunks[0]).calculate_per_token_loss
    with no_trace(chunks):
        yield
    if not is_per_token:
        for chunk in chunks:
            chunk.scale_gradients(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


@contextmanager
def no_trace(chunks: Sequence[DistributedDataParallel], *, but_for_fp8: bool = False) -> Iterator[None]:
    """Undo what forward and backward passes inside change beside the gradient, also when one of them raises.

    ``but_for_fp8``: leave the FP8 scales that they find, for passes that follow.
    """
    with ExitStack() as stack:
        if not but_for_fp8:
            stack.enter_context(fp8_state_kept(chunks))
        stack.enter_context(_random_states())
        stack.enter_context(_module_buffers(chunks))
        stack.enter_context(_router_metrics())
        stack.enter_context(attributes_set(_watchers()))
        stack.enter_context(_pass_settings(chunks))
        yield


@contextmanager
def _random_states() -> Iterator[None]:
    """Python, NumPy, torch on the host and the accelerator, and Megatron's tracker of tensor-parallel states."""
    python, numpy_, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = torch.cuda.get_rng_state()
    tracker = get_cuda_rng_tracker()
    # A tracker for CUDA graphs (--te-rng-tracker, --inference-rng-tracker) holds generators, which passes advance in place.
    tracked = tracker.get_states()
    kept = {name: _state_of(state) for name, state in tracked.items()}
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(host)
        torch.cuda.set_rng_state(accelerator)
        tracker.set_states({name: _set_back(state, kept[name]) for name, state in tracked.items()})


def _state_of(state: Tensor | torch.Generator) -> Tensor:
    return state.get_state() if isinstance(state, torch.Generator) else state.clone()


def _set_back(state: Tensor | torch.Generator, kept: Tensor) -> Tensor | torch.Generator:
    return state.set_state(kept) if isinstance(state, torch.Generator) else kept


@contextmanager
def _module_buffers(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Expert bias and token counts of routers, and any other buffer: ``finalize_model_grads`` updates some of them.

    (``chunk.buffers`` are Megatron's gradient buffers, hence ``chunk.module``.)
    """
    saved = [(buffer, buffer.clone()) for chunk in chunks for buffer in chunk.module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def _router_metrics() -> Iterator[None]:
    """Auxiliary losses that routers add up for the log line."""
    tracker = get_moe_metrics_tracker()
    saved, tracker._metrics = tracker._metrics, {}
    try:
        yield
    finally:
        tracker._metrics = saved


def _watchers() -> list[tuple[Any, str, Any]]:
    """Megatron's objects that record passes, where they are in use, with the setting that empties or stops each."""
    settings: list[tuple[Any, str, Any]] = []
    if attention := sys.modules.get("megatron.core.transformer.experimental_attention_variant.dsa"):
        settings.append((attention.DSAIndexerLossLoggingHelper, "tracker", {}))
    traces = sys.modules.get("megatron.core.transformer.moe.router_trace")
    if traces and traces._MOE_ROUTER_TRACER is not None:
        settings.append((traces._MOE_ROUTER_TRACER, "_stopped", True))
    return settings


def _pass_settings(chunks: Sequence[DistributedDataParallel]) -> AbstractContextManager[None]:
    """No timers, which would add to the training step's; the mean over tokens; no watch on NaN gradients.

    That watch goes through the rerun state machine; for references the plugin's own check takes its place. And the largest
    attention logits are those of training (``--qk-clip``, ``--log-max-attention-logit``).
    """
    settings: list[tuple[Any, str, Any]] = []
    for chunk in chunks:
        config = get_model_config(chunk)
        settings += [(config, "timers", None), (config, "calculate_per_token_loss", True)]
        # Routers keep a copy, by which they weigh the losses that balance experts.
        settings += [
            (router, "calculate_per_token_loss", True) for router in chunk.modules() if isinstance(router, Router)
        ]
        settings += [
            (chunk.ddp_config, "check_for_nan_in_grad", False),
            (chunk.ddp_config, "check_for_large_grads", False),
        ]
        settings += [(module, LARGEST_LOGITS, None) for module in chunk.modules() if hasattr(module, LARGEST_LOGITS)]
    return attributes_set(settings)
