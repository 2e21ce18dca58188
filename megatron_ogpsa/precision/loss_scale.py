"""The loss scale of reference passes in fp16, which is not training's.

Megatron begins at 2³² (``--initial-loss-scale``) and halves that after each step whose gradient overflows, which training
survives by skipping the step. A refresh has no step to skip, and the first one comes before all steps; so reference passes
have a scale of their own, and are repeated with a smaller one where they overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_ogpsa.attributes import attributes_set

FIRST_SCALE = 2.0**15
"""The largest power of two in fp16: beyond it the gradient of a single token's logits can overflow."""

FACTOR = 16.0
"""Between one attempt and the next: few attempts, each of which costs a refresh."""

GROWTH = 2.0
"""From one refresh to the next: where a smaller scale than the first is needed, one attempt in five is in vain."""

_OTHER_SCALES = ("moe_grad_scale_func", "mtp_grad_scale_func")
"""Of auxiliary losses, which take the same scale where these are None (``core/pipeline_parallel/schedules.py``)."""


def attempts(chunks: Sequence[torch.nn.Module], first: float) -> Iterator[float | None]:
    """The scales to try, from ``first`` down to 1; one None for a model that is not in fp16, and has no scale."""
    if not get_model_config(chunks[0]).fp16:
        yield None
        return
    scale = first
    while scale > 1.0:
        yield scale
        scale = max(1.0, scale / FACTOR)
    yield 1.0


def next_scale(scale: float) -> float:
    """With which the passes of the next refresh begin, after those at ``scale`` did not overflow."""
    return min(FIRST_SCALE, scale * GROWTH)


def loss_scaled(chunks: Sequence[torch.nn.Module], scale: float | None) -> AbstractContextManager[None]:
    """Backward passes inside begin at ``scale`` times the loss, auxiliary losses included; None changes nothing."""
    if scale is None:
        return nullcontext()
    configs = [get_model_config(chunk) for chunk in chunks]
    settings: list[tuple[object, str, Callable[[Tensor], Tensor] | None]] = [
        (config, "grad_scale_func", lambda loss: loss * scale) for config in configs
    ]
    settings += [(config, name, None) for config in configs for name in _OTHER_SCALES if hasattr(config, name)]
    return attributes_set(settings)
