"""The operations on lists of tensors with which optimizers step, clip and measure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def multi_tensor_adam(
    chunk_size: int,
    noop: Tensor,
    tensors: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam's step, decoupled weight decay if ``adam_w``; lists: gradients, parameters, moments, and main parameters."""
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, first, second, *main in zip(*tensors, strict=True):
        g, p = gradient.float(), (main[0] if main else parameter).float()
        if not adam_w:
            g = g + weight_decay * p
        m = beta1 * first.float() + (1 - beta1) * g
        v = beta2 * second.float() + (1 - beta2) * g * g
        update = (m / correction1) / ((v / correction2).sqrt() + eps)
        p = p - lr * (update + weight_decay * p if adam_w else update)
        for target, value in ((first, m), (second, v), (parameter, p), *((one, p) for one in main)):
            target.copy_(value)


def multi_tensor_scale(chunk_size: int, noop: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    """Second list = scale · first list."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(chunk_size: int, noop: Tensor, tensors: list[list[Tensor]], scale: Tensor) -> None:
    """The same by a factor that lies on the device."""
    multi_tensor_scale(chunk_size, noop, tensors, float(scale))


def multi_tensor_l2norm(
    chunk_size: int, noop: Tensor, tensors: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm over all tensors, and each one's own."""
    norms = torch.stack([tensor.float().norm() for tensor in tensors[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.zeros(0)


def fused_amax_and_scale_update_after_reduction(
    amax_reduced: Tensor,
    histories: list[Tensor],
    scales: list[Tensor],
    algorithm: Any,
    dtype: int,
    margin: float,
) -> None:
    """Delayed scaling: each history takes its reduced magnitudes in and rolls on, and scales follow from it."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    from tests.transformer_engine.enums import torch_dtype

    recipe = DelayedScaling(margin=margin, amax_compute_algo=algorithm)
    parts = torch.split(amax_reduced, [history.shape[1] for history in histories])
    for history, scale, part in zip(histories, scales, parts, strict=True):
        history[0].copy_(part)
        _amax_and_scale_update(history, scale, torch.finfo(torch_dtype(dtype)).max, recipe)
