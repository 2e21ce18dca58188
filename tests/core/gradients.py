"""Gradients of a sharded model as full Hugging Face tensors: put together from all ranks, or planted in all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_ogpsa.sharding.gradients import _model_and_main_params, leaf_optimizers
from tests.core.canonical import canonical_parts, gather_parts, part_index
from tests.core.megatron_model import Training
from tests.core.oracle import Tensors, shapes_of

Read = Callable[[torch.nn.Parameter, Tensor, slice], Tensor]
"""From a model parameter, the tensor that the inner optimizer updates for it, and the elements of the flattened
parameter that this tensor stands for, to the gradient of those elements."""


def canonical_gradient(training: Training, read: Read) -> Tensors:
    """Put the gradients of all ranks together as full Hugging Face tensors, fp64, without those that are frozen.

    Copies on several ranks must be equal and are averaged; an element that no rank holds fails.
    """
    shapes = {n: size for n, size in shapes_of(training.shape).items() if not training.layout.is_frozen(n)}
    values = {name: torch.zeros(size, dtype=torch.float64) for name, size in shapes.items()}
    counts = {name: torch.zeros_like(value) for name, value in values.items()}
    largest = {name: torch.full_like(value, -torch.inf) for name, value in values.items()}
    for param, value, count in _local_gradients(training, read):
        row = 0
        for name, rows, columns in _parts_of(training)[param]:
            index = part_index(values[name], rows, columns)
            stop = row + values[name][index].shape[0]
            values[name][index] += value[row:stop]
            counts[name][index] += count[row:stop]
            held = torch.where(count[row:stop] > 0, value[row:stop], -torch.inf)
            largest[name][index] = torch.maximum(largest[name][index], held)
            row = stop
    _over_all_ranks(values, dist.ReduceOp.SUM)
    _over_all_ranks(counts, dist.ReduceOp.SUM)
    _over_all_ranks(largest, dist.ReduceOp.MAX)
    for name in values:
        assert counts[name].min() >= 1, f"no rank holds some elements of {name}"
        values[name] /= counts[name]
        # Copies are bitwise equal; the mean of up to four fp32 numbers is rounded in fp64 only.
        assert torch.allclose(values[name], largest[name], rtol=1e-12, atol=0.0), f"copies of {name} differ"
    return values


def _over_all_ranks(tensors: Tensors, operation: dist.ReduceOp.RedOpType) -> None:
    """In place; together, as each all-reduce takes two cores a millisecond, however small it is."""
    together = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(together, op=operation)
    for tensor, reduced in zip(tensors.values(), together.split([t.numel() for t in tensors.values()]), strict=True):
        tensor.copy_(reduced.view_as(tensor))


def _parts_of(training: Training) -> dict[torch.nn.Parameter, Any]:
    if training.parts is None:
        training.parts = {p: parts for c in training.chunks for p, parts in canonical_parts(c.module, training.shape)}
    return training.parts


def _local_gradients(training: Training, read: Read) -> Any:
    """(model parameter, its gradient, which elements of it this rank holds), the two in the parameter's shape."""
    for optimizer in leaf_optimizers(training.optimizer):
        if getattr(optimizer, "is_stub_optimizer", False):  # everything that it would hold is frozen
            continue
        for param, main in _model_and_main_params(optimizer):
            held = slice(0, param.numel())
            if isinstance(optimizer, DistributedOptimizer):
                shard = optimizer._get_model_param_range_map(param)["param"]
                held = slice(shard.start, shard.end)
            value, count = (torch.zeros(param.numel(), dtype=torch.float64) for _ in range(2))
            value[held], count[held] = read(param, main, held).flatten().double(), 1.0
            yield param, value.view_as(param), count.view_as(param)


def projected_gradient(training: Training) -> tuple[Tensors, Any]:
    """Step once and return the gradient that the inner optimizer saw, and what the step returned."""
    grad_name = "decoupled_grad" if training.layout.precision_aware else "grad"
    seen: dict[int, Tensor] = {}

    def record() -> bool:
        for group in training.optimizer.param_groups:
            for param in group["params"]:
                seen[id(param)] = getattr(param, grad_name).clone()
        return True

    training.optimizer.step_with_ready_grads = record
    result = training.optimizer.step()
    del training.optimizer.step_with_ready_grads
    return canonical_gradient(training, lambda param, main, held: seen[id(main)]), result


def reduced_gradient(training: Training) -> Tensors:
    """The gradient that ``finalize_model_grads`` has left in Megatron's buffers."""
    return canonical_gradient(training, lambda param, main, held: param.main_grad.view(-1)[held])  # type: ignore[attr-defined]


def plant(training: Training, tensors: Tensors, scale: float = 1.0) -> None:
    """Put a gradient where ``finalize_model_grads`` leaves one: in Megatron's buffers, each copy alike."""
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    for param, parts in _parts_of(training).items():
        if param.requires_grad:
            param.main_grad.copy_(scale * gather_parts(parts, tensors))
    training.optimizer.zero_grad()


def kept(training: Training) -> list[Tensor]:
    """Copies of Megatron's buffers, with what ``finalize_model_grads`` has left in them."""
    return [buffer.grad_data.clone() for buffer in _buffers(training)]


def put_back(training: Training, copies: list[Tensor]) -> None:
    """What :func:`kept` has copied, as if it had just been reduced."""
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    for buffer, copy in zip(_buffers(training), copies, strict=True):
        buffer.grad_data.copy_(copy)
    training.optimizer.zero_grad()


def _buffers(training: Training) -> list[Any]:
    return [b for chunk in training.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
