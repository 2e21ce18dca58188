"""What the ranks run to show reference passes through ``references.refresh``; jobs that return plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ogpsa import OGPSAConfig, attach
from megatron_ogpsa.references.gradients import MicroBatch, Reference, refresh
from tests.core import oracle
from tests.core.cases import batch_of
from tests.core.gradients import reduced_gradient
from tests.core.layouts import ALL_LAYOUTS, RANDOM
from tests.core.megatron_model import Training, build, forward_step, local_micro_batches

FIELDS = ("tokens", "labels", "mask")


def _reference(training: Training, name: str, seed: int) -> Reference:
    micro_batches = local_micro_batches(training.layout, batch_of(training.shape, seed))

    def step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], object]]:
        micro_batch = next(iterator)
        return forward_step(iter([(micro_batch["tokens"], micro_batch["labels"], micro_batch["mask"])]), model)

    return Reference(
        name=name,
        micro_batches=tuple(dict(zip(FIELDS, micro_batch, strict=True)) for micro_batch in micro_batches),
        forward_step=step,
        loss="nll",
        num_samples=0,
        num_supervised_tokens=0,
        fingerprint="",
    )


def gradients_of_a_refresh(training: Training, names: str) -> dict[str, oracle.Tensors]:
    """The reduced gradients that a refresh captures, for the references whose seeds are ``names``, in this order."""
    captured: dict[str, oracle.Tensors] = {}
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig())
    capture = ogpsa.capture

    def recorded(name: str, *, loss_scale: float | None = None) -> None:
        captured[name] = reduced_gradient(training)
        capture(name)

    ogpsa.capture = recorded  # type: ignore[method-assign]
    refresh(
        ogpsa,
        [_reference(training, name, int(name)) for name in names],
        optimizer=training.optimizer,
        chunks=training.chunks,
        forward_backward=get_forward_backward_func(),
        seq_length=training.shape.positions,
        micro_batch_size=training.layout.micro_batch,
    )
    ogpsa.detach()
    return captured


def refresh_in_fp16(layout: str, first_scale: float) -> dict[str, Any]:
    """A refresh whose passes begin at a loss scale, of a run whose own is too large; and the oracle's gradient."""
    sharding = ALL_LAYOUTS[layout]
    shape = oracle.ModelShape(**sharding.model)
    weights = oracle.random_weights(shape, seed=1)
    training = build(sharding, weights, initial_loss_scale=2.0**32)
    gradients: list[oracle.Tensors] = []
    scales: list[float] = []
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig())
    ogpsa.reference_loss_scale = first_scale
    capture = ogpsa.capture

    def recorded(name: str, *, loss_scale: float | None = None) -> None:
        assert loss_scale is not None
        scales.append(loss_scale)
        capture(name, loss_scale=loss_scale)
        if ogpsa.captured_are_finite():
            gradients.append(reduced_gradient(training))

    ogpsa.capture = recorded  # type: ignore[method-assign]
    refreshed = refresh(
        ogpsa,
        [_reference(training, "0", 0)],
        optimizer=training.optimizer,
        chunks=training.chunks,
        forward_backward=get_forward_backward_func(),
        seq_length=shape.positions,
        micro_batch_size=sharding.micro_batch,
    )
    assert len(gradients) == 1, "every attempt has overflowed"
    expected = oracle.gradient(shape, weights, batch_of(shape, 0))
    return {
        "is_new": refreshed.is_new,
        "rejected": ogpsa.rejected_refreshes,
        "scales": scales,
        "next": ogpsa.reference_loss_scale,
        "training's": training.optimizer.get_loss_scale().item(),
        "error": oracle.relative_error({name: tensor / scales[-1] for name, tensor in gradients[0].items()}, expected),
    }


def order_of_references(layout: str) -> dict[str, float]:
    """How far each reference's gradient differs when the references come the other way round."""
    shape = oracle.ModelShape(**RANDOM[layout].model)
    training = build(RANDOM[layout], oracle.random_weights(shape, seed=1))
    forward, backward = (gradients_of_a_refresh(training, names) for names in ("012", "210"))
    return {name: oracle.relative_error(backward[name], forward[name]) for name in forward}


def mean_of_training(layout: str) -> float:
    """How far a reference's gradient depends on whether training takes the mean over tokens or over micro-batches."""
    shape = oracle.ModelShape(**RANDOM[layout].model)
    weights = oracle.random_weights(shape, seed=1)
    gradients: list[oracle.Tensors] = []
    for per_token in (True, False):
        parallel_state.destroy_model_parallel()
        training = build(RANDOM[layout], weights, per_token=per_token)
        gradients.append(gradients_of_a_refresh(training, "0")["0"])
    return oracle.relative_error(gradients[1], gradients[0])
