"""What the projection adds to a run: bytes of memory, bytes on the wire, and time. Pure arithmetic.

Symbols: k references, N elements of a rank's gradient shard, B blocks of the whole model, b bytes of a stored basis
element, m micro-batches, p pipeline stages, v model chunks of a stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ogpsa.plugin.streaming import NUM_BUFFERS
from megatron_ogpsa.projection.segments import TileLimits

FP32, FP64 = 4, 8

FP8_SPEED = 2
"""Products in FP8 are at most so many times as fast as in bf16 (peak rates of NVIDIA's H100, H200 and B200)."""

LONGEST_TILE = TileLimits.for_device(torch.device("cuda")).tile
"""Elements of a staging buffer's rows."""


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """What one rank holds.

    Attributes:
        elements: N, of the gradient that its optimizer updates.
        trained: elements of its share of the model that are trained, before any sharding over data parallelism.
        packed: of these, how many are projected in an fp32 copy, because Megatron's own gradient is bf16.
        weight_bytes, gradient_bytes: Megatron's buffers of the local model, before any sharding over data parallelism.
        state_bytes: the optimizer's, fp32 main parameters included.
    """

    elements: int
    trained: int
    packed: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def megatron_bytes(self) -> int:
        """Megatron's, without activations."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The settings that costs depend on: k, b, where the basis lies, what is projected, and B."""

    references: int
    basis_bytes: int
    on_host: bool
    of_update: bool
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank beside Megatron's own: between refreshes, and what a refresh adds where the basis lies."""

    accelerator: int
    host: int
    refresh: int


def memory(projection: Projection, shard: ShardSize) -> Memory:
    """k·N·b for the basis; in a refresh k·N fp32 gradients beside it, which become the new basis or are freed.

    A basis on the host takes staging buffers on the accelerator, which do not grow with N; what a refresh takes there is kept
    for the next one.

    bf16 training gradients are projected in one fp32 copy of the shard.
    """
    basis = projection.references * shard.elements * projection.basis_bytes
    copy = shard.packed * FP32
    staging = NUM_BUFFERS * projection.references * min(shard.elements, LONGEST_TILE) * projection.basis_bytes
    on_accelerator = staging if projection.on_host else basis
    captured = projection.references * shard.elements * FP32
    return Memory(
        accelerator=on_accelerator + copy,
        host=basis if projection.on_host else 0,
        refresh=captured,
    )


def share_on_accelerator(args: argparse.Namespace) -> float:
    """Of the optimizer's state, where ``--optimizer-cpu-offload`` takes the rest to host memory."""
    return 1.0 - args.optimizer_offload_fraction if args.optimizer_cpu_offload else 1.0


def state_bytes(args: argparse.Namespace) -> int:
    """Bytes of optimizer state for each element that a rank updates, main parameters included."""
    aware = args.use_precision_aware_optimizer
    main = args.main_params_dtype.itemsize if aware else FP32
    if aware and main == FP32 and args.params_dtype == torch.bfloat16:
        main = 2  # what fp32 has beyond the bf16 parameter (store_param_remainders of Megatron's OptimizerConfig)
    main = 0 if args.params_dtype == torch.float32 else main
    if args.optimizer == "sgd":
        return main + (FP32 if args.sgd_momentum else 0)
    moments = (args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize) if aware else 2 * FP32
    return int(main + moments)


def checkpoint_host_bytes(shard: ShardSize, *, gathers: bool) -> int:
    """Host memory that a rank takes while a checkpoint is saved or loaded, beside what passes through.

    Where the distributed optimizer's state is to be resharded, each rank holds that of all that share its part of the model:
    fp32 main parameters and two moments (``core/optimizer/distrib_optimizer.py``, ``get_parameter_state_dp_zero``).
    """
    return 3 * FP32 * shard.trained if gathers else 0


def step_traffic(projection: Projection, shard: ShardSize) -> int:
    """Bytes that a projected step reads and writes in a rank's memory: Q twice, the gradient twice, and once written.

    A projected update reads Q and the parameters a third time (before the step, after it, and to correct it), and the
    gradient once for its norm.
    """
    reads = 3 if projection.of_update else 2
    row = projection.references * projection.basis_bytes
    written_and_read = 2 * FP32 if projection.of_update else FP32
    return shard.elements * (reads * (row + FP32) + written_and_read) + shard.packed * 2 * FP32


def step_message(projection: Projection) -> int:
    """Bytes of the all-reduce of a step: k coefficients for each block, and ‖g‖² where it replaces Megatron's norm."""
    numbers = projection.references + (0 if projection.of_update else 1)
    return projection.blocks * numbers * FP64


def refresh_message(projection: Projection) -> int:
    """Bytes of the one all-reduce of a refresh: for each block a k×k Gram matrix, the k×k products with the basis in use,
    and k numbers of how far the parameters moved along it. The first refresh of a run sends the Gram matrices alone.
    """
    return projection.blocks * projection.references * (2 * projection.references + 1) * FP64


def reference_micro_batches(samples: int, micro_batch: int, data_parallel: int, multiple: int = 1) -> int:
    """Micro-batches of a data-parallel rank for one reference; rows are filled up, see ``data/micro_batches.py``."""
    rows = micro_batch * data_parallel * multiple
    return -(-samples // rows) * multiple


def refresh_interval(round_: int, save_interval: int | None, steps: int, early: Sequence[int] = ()) -> float:
    """Steps in which all references are refreshed once, on average over a run.

    Args:
        round_: steps in which they are without checkpoints, each of which begins anew with a refresh.
        steps: of the run.
        early: those after which there are refreshes besides (``references/steps.py``).
    """
    interval = save_interval / -(-save_interval // round_) if save_interval else round_
    return steps / (steps / interval + sum(step < steps for step in early))


def refresh_share(
    micro_batches: int,
    reference_micro_batches: Sequence[int],
    interval: float,
    pipeline: int,
    virtual: int,
    cost: float = 1.0,
) -> float:
    """Share of the time of forward and backward passes that refreshes take.

    A pass over m micro-batches lasts m + (p−1)/v micro-batches, the second term being the pipeline's bubble (Narayanan et
    al., arXiv:2104.04473, section 2.2). Gradient reduction happens in each pass alike; the optimizer's step, which only
    training has, is left out, so that this is an upper bound. A reference micro-batch takes the time of ``cost`` of training.
    """
    bubble = (pipeline - 1) / virtual
    references = cost * sum(m + bubble for m in reference_micro_batches)
    return references / (references + interval * (micro_batches + bubble))
