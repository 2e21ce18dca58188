"""What the ranks run to show the reference passes: what they capture, and what they leave behind."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_ogpsa import attach
from megatron_ogpsa.references.gradients import MicroBatch, Reference, refresh
from megatron_ogpsa.references.one_pass import LARGEST_LOGITS
from tests.core import oracle
from tests.core.cases import REFERENCES, batch_of, expectation
from tests.core.gradients import plant, reduced_gradient
from tests.core.layouts import ALL_LAYOUTS
from tests.core.megatron_model import Training, build, forward_step

BIAS_UPDATE_RATE = 1e-6
"""What a pass adds to the bias of experts: seen in fp32, and too little for the oracle's choice of experts to change."""


def reference_passes(layout: str) -> dict[str, Any]:
    """A refresh through Megatron's schedules, with passes that draw and record all that a training pass may."""
    sharding = ALL_LAYOUTS[layout]
    shape = oracle.ModelShape(**sharding.model)
    training = build(sharding, oracle.random_weights(shape, seed=1))
    safety, expected = expectation(tuple(sharding.model.items()), sharding.frozen)
    ogpsa = attach(training.optimizer, training.chunks)
    captured: list[oracle.Tensors] = []
    capture = ogpsa.capture

    def recording(name: str, *, loss_scale: float | None = None) -> None:
        captured.append(reduced_gradient(training))
        capture(name)

    ogpsa.capture = recording  # type: ignore[method-assign]
    for chunk in training.chunks:
        get_model_config(chunk).moe_router_bias_update_rate = BIAS_UPDATE_RATE
        for name, buffer in chunk.module.named_buffers():
            if name.endswith("local_tokens_per_expert"):
                buffer.fill_(3.0)  # of the training step that is under way
        for attention in _attentions(chunk):
            setattr(attention, LARGEST_LOGITS, torch.ones(2))
    get_moe_metrics_tracker().record("balance", torch.ones(()), layer_number=1, num_layers=shape.num_layers)
    plant(training, safety)  # what the step before has left in the buffers
    before = _state(training)
    refreshed = refresh(
        ogpsa,
        [_reference(name, batch_of(shape, seed), layout) for seed, name in enumerate(REFERENCES)],
        optimizer=training.optimizer,
        chunks=training.chunks,
        forward_backward=get_forward_backward_func(),
        seq_length=shape.positions,
        micro_batch_size=sharding.micro_batch,
    )
    after = _state(training)
    gradients = [p.main_grad for c in training.chunks for p in c.parameters() if p.requires_grad]
    return {
        "is_new": refreshed.is_new,
        "losses": {name: parts[name].value for name, parts in refreshed.losses.items()},
        "expected_losses": expected_losses(layout),
        "errors": [oracle.relative_error(*pair) for pair in zip(captured, expected, strict=True)],
        "changed": [name for name, value in before.items() if not _same(value, after[name])],
        "gradient_left": max(float(gradient.abs().max()) for gradient in gradients),
    }


@functools.cache
def expected_losses(layout: str) -> dict[str, float]:
    """The unsharded model's."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    weights = oracle.random_weights(shape, seed=1)
    return {
        name: float(oracle.mean_loss(shape, weights, *batch_of(shape, seed))) for seed, name in enumerate(REFERENCES)
    }


def parts_of_a_reference(layout: str) -> dict[str, Any]:
    """A reference of rank 2: the gradients of its first and its second half, and the rank of each tensor's subspace."""
    sharding = ALL_LAYOUTS[layout]
    shape = oracle.ModelShape(**sharding.model)
    weights = oracle.random_weights(shape, seed=1)
    training = build(sharding, weights)
    ogpsa = attach(training.optimizer, training.chunks)
    captured: dict[str, oracle.Tensors] = {}
    capture = ogpsa.capture

    def recording(name: str, *, loss_scale: float | None = None) -> None:
        captured[name] = reduced_gradient(training)
        capture(name)

    ogpsa.capture = recording  # type: ignore[method-assign]
    batch = batch_of(shape, seed=0)
    refresh(
        ogpsa,
        [dataclasses.replace(_reference("math", batch, layout), rank=2)],
        optimizer=training.optimizer,
        chunks=training.chunks,
        forward_backward=get_forward_backward_func(),
        seq_length=shape.positions,
        micro_batch_size=sharding.micro_batch,
    )
    half = len(batch[0]) // 2
    halves = [tuple(tensor[rows] for tensor in batch) for rows in (slice(half), slice(half, None))]
    expected = [oracle.gradient(shape, weights, rows) for rows in halves]  # type: ignore[arg-type]
    training.gradient(batch)
    training.optimizer.step()
    return {
        "names": [*captured],
        "errors": [oracle.relative_error(*pair) for pair in zip(captured.values(), expected, strict=True)],
        "rank": ogpsa.metrics["rank"],
    }


def _reference(name: str, batch: tuple[Tensor, ...], layout: str) -> Reference:
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    pieces = zip(*(tensor[rank::size].split(ALL_LAYOUTS[layout].micro_batch) for tensor in batch), strict=True)
    return Reference(
        name=name,
        micro_batches=tuple(dict(zip(("tokens", "labels", "loss_mask"), piece, strict=True)) for piece in pieces),
        forward_step=_drawing_step,
        loss="nll",
        num_samples=len(batch[0]),
        num_supervised_tokens=int(batch[2].sum()),
        fingerprint="",
    )


def _drawing_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    random.random(), np.random.rand(), torch.rand(())
    with get_cuda_rng_tracker().fork():  # as dropout does
        torch.rand(())
    get_moe_metrics_tracker().record("balance", torch.ones(()), layer_number=1, num_layers=4)
    for attention in _attentions(model):  # as Transformer Engine's does with --qk-clip
        so_far = getattr(attention, LARGEST_LOGITS, None)
        setattr(attention, LARGEST_LOGITS, torch.full((2,), 9.0) if so_far is None else so_far + 1)
    row = next(iterator)
    return forward_step(iter([(row["tokens"], row["labels"], row["loss_mask"])]), model)


def _attentions(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for name, module in chunk.named_modules() if name.endswith("core_attention")]


def _state(training: Training) -> dict[str, Any]:
    """Copies of what a pass changes beside the gradient."""
    configs = [get_model_config(chunk) for chunk in training.chunks]
    return {
        "python": random.getstate(),
        "numpy": [*np.random.get_state()[1]],  # type: ignore[index]
        "torch": torch.get_rng_state(),
        "accelerator": torch.cuda.get_rng_state(),
        "tracked": {name: _copied(state) for name, state in get_cuda_rng_tracker().get_states().items()},
        "buffers": {
            f"{index}.{name}": buffer.clone()
            for index, chunk in enumerate(training.chunks)
            for name, buffer in chunk.module.named_buffers()
        },
        "router metrics": {name: entry.values.clone() for name, entry in get_moe_metrics_tracker().metrics.items()},
        "settings": [(config.timers, config.calculate_per_token_loss) for config in configs],
        "largest logits": {
            number: getattr(attention, LARGEST_LOGITS)
            for number, attention in enumerate(
                attention for chunk in training.chunks for attention in _attentions(chunk)
            )
        },
        "watch": [
            (chunk.ddp_config.check_for_nan_in_grad, chunk.ddp_config.check_for_large_grads)
            for chunk in training.chunks
        ],
    }


def _copied(state: Any) -> Any:
    return state.clone() if isinstance(state, Tensor) else state


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)
