"""Where the gradients that the optimizer is about to use lie in memory.

Megatron accumulates gradients in flat buffers, and with fp32 gradients (or the precision-aware optimizer) the optimizer
reads views of them: those are projected in place, a few contiguous spans for the whole shard. With bf16 gradients
Megatron gives the optimizer a fresh fp32 copy of each parameter's gradient in every step; those are packed into one
flat span and written back after the projection.

The same list of spans is the layout of the basis: column n of the basis and element n of the shard are the same element
of the model, on the same rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor

from megatron_ogpsa.collectives import union_of_names
from megatron_ogpsa.projection.segments import Segment, SegmentLayout
from megatron_ogpsa.sharding.logical import logical_runs
from megatron_ogpsa.sharding.names import NamedParameter, named_parameters
from megatron_ogpsa.sharding.ownership import Reduction, is_counted, reduction_of

_BUFFER_ALIGNMENT = 64
"""Megatron starts each parameter at a multiple of this many elements (``core/optimizer/param_layout.py``); what lies
between two neighbours that are closer is padding, which is zero in every gradient."""


@dataclass(frozen=True)
class Piece:
    """The part [start, stop) of a flattened local parameter that this rank's optimizer updates.

    Attributes:
        holder: the tensor whose ``grad`` (or ``decoupled_grad``) the inner optimizer reads.
        grad_name: which of the two.
        in_place: whether that gradient is a view of Megatron's gradient buffer.
        counted: whether this copy enters sums over ranks.
    """

    parameter: NamedParameter
    start: int
    stop: int
    holder: Tensor
    grad_name: str
    in_place: bool
    counted: bool

    @property
    def main_grad(self) -> Tensor:
        """The reduced gradient in Megatron's buffer, 1-D, in the buffer's dtype."""
        return main_grad_of(self.parameter.param).view(-1)[self.start : self.stop]

    @property
    def gradient(self) -> Tensor:
        """The gradient that the optimizer will read, 1-D; set by Megatron's ``prepare_grads``."""
        gradient: Tensor = getattr(self.holder, self.grad_name)
        return gradient.view(-1)


class GradientShard:
    """This rank's part of the model's gradient, as contiguous spans cut into blocks.

    Args:
        optimizer: a supported Megatron optimizer (see :func:`megatron_ogpsa.plugin.ogpsa.attach`).
        chunks: this rank's model chunks.
        by_tensor: one block for each logical tensor, or one for the whole model.

    Attributes:
        reduction: the ranks over which sums go.
        block_names: names of the blocks of the whole model, the same on each rank.
        layout: blocks and tiles of the spans.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel], *, by_tensor: bool
    ) -> None:
        optimizers = leaf_optimizers(optimizer)
        self.reduction = reduction_of(optimizers, chunks)
        self._reaches_parameters = not any(
            getattr(leaf.config, name, False)
            for leaf in optimizers
            for name in ("optimizer_cpu_offload", "use_precision_aware_optimizer")
        )
        pieces = list(pieces_of(optimizers, chunks, self.reduction))
        self._runs = _adjacent_runs([piece for piece in pieces if piece.in_place])
        self._packed = [piece for piece in pieces if not piece.in_place]
        self._spans = [_span(run) for run in self._runs]
        device = pieces[0].parameter.param.device if pieces else torch.device(torch.cuda.current_device())
        if self._packed:
            length = sum(piece.stop - piece.start for piece in self._packed)
            self._spans.append(torch.zeros(length, dtype=torch.float32, device=device))
            self._packed_views = list(self._spans[-1].split([p.stop - p.start for p in self._packed]))

        named_spans = [list(_named_segments(run)) for run in [*self._runs, *([self._packed] if self._packed else [])]]
        local_names = sorted({name for span in named_spans for name, *_ in span}) if by_tensor else ["model"]
        self.block_names = union_of_names(local_names, self.reduction.group)
        self._by_tensor = by_tensor
        self._block_of = {name: block for block, name in enumerate(self.block_names)}
        self.layout = SegmentLayout([*map(self._segments, named_spans)], len(self.block_names), device)

    def _segments(self, named_span: Sequence[tuple[str, int, bool]]) -> list[Segment]:
        return [
            Segment(length, self._block_of[name if self._by_tensor else "model"], counted)
            for name, length, counted in named_span
        ]

    @property
    def spans(self) -> list[Tensor]:
        """The gradient, 1-D tensors in memory order; :meth:`load` before reading, :meth:`store` after writing."""
        return self._spans

    @property
    def reaches_parameters(self) -> bool:
        """Whether :attr:`parameters` are what the inner optimizers update; some keep fp32 copies within themselves."""
        return self._reaches_parameters

    @property
    def parameters(self) -> list[Tensor]:
        """What the inner optimizers update, 1-D and fp32: the spans of :attr:`parameter_layout`.

        They may require gradients: to be read and written under ``no_grad`` alone. Those of the distributed optimizer are 1-D
        already and given as they are, since views of some hundred tensors take the host milliseconds, in which a GPU waits.
        """
        return [holder if holder.dim() == 1 else holder.detach().view(-1) for holder in self._holders]

    @cached_property
    def parameter_layout(self) -> SegmentLayout:
        """The blocks of :attr:`parameters`, with the basis' columns that belong to them.

        Main parameters of 16-bit models are tensors of their own, so that each piece is a span and has tiles of its own.
        """
        return SegmentLayout(
            [self._segments(list(_named_segments([piece]))) for piece in self._pieces],
            len(self.block_names),
            self.layout.device,
            columns=list(self._columns()),
            num_columns=self.layout.num_elements,
        )

    @cached_property
    def _pieces(self) -> list[Piece]:
        return [*chain.from_iterable(self._runs), *self._packed]

    @cached_property
    def _holders(self) -> list[Tensor]:
        return [piece.holder for piece in self._pieces]

    def _columns(self) -> Iterator[int]:
        """Where each piece begins in the basis."""
        starts = [0, *accumulate(self.layout.span_lengths)]
        for run, start in zip(self._runs, starts, strict=False):
            first = run[0].main_grad.storage_offset()
            yield from (start + int(piece.main_grad.storage_offset()) - int(first) for piece in run)
        if self._packed:
            yield from accumulate((p.stop - p.start for p in self._packed[:-1]), initial=starts[len(self._runs)])

    def load(self) -> None:
        """Bring the gradient that Megatron has prepared into the spans; free where it lies there already."""
        for run, span in zip(self._runs, self._spans, strict=False):
            if run[0].gradient.data_ptr() != span.data_ptr():
                raise RuntimeError(
                    f"the gradient of {run[0].parameter.name} has left Megatron's gradient buffer since the plugin was "
                    "attached; detach it before the optimizer or the model is rebuilt"
                )
        if self._packed:
            torch._foreach_copy_(self._packed_views, [piece.gradient for piece in self._packed])

    def store(self) -> None:
        """Give the spans back to the optimizer; free where they are its own."""
        if self._packed:
            torch._foreach_copy_([piece.gradient for piece in self._packed], self._packed_views)

    def read_main_grads(self, out_N: Tensor) -> None:
        """Copy the reduced gradient from Megatron's buffers to a row of the basis, fp32 [N]; nothing else changes."""
        rows = out_N.split(self.layout.span_lengths)
        for span, row in zip(self._spans[: len(self._runs)], rows, strict=False):
            row.copy_(span)
        if self._packed:
            views = rows[-1].split([piece.stop - piece.start for piece in self._packed])
            torch._foreach_copy_(list(views), [piece.main_grad for piece in self._packed])


def main_grad_of(param: torch.nn.Parameter) -> Tensor:
    """The gradient that Megatron's data parallelism accumulates and reduces for ``param``."""
    main_grad: Tensor = param.main_grad  # type: ignore[attr-defined]  # set by DistributedDataParallel
    return main_grad


def leaf_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that hold parameters: the members of a chain, or the optimizer itself."""
    members = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return list(members)


def pieces_of(
    optimizers: Sequence[MegatronOptimizer], chunks: Sequence[DistributedDataParallel], reduction: Reduction
) -> Iterator[Piece]:
    """The pieces of all ``optimizers``, in their own order. Local, no communication."""
    by_param = {parameter.param: parameter for parameter in named_parameters(chunks)}
    for optimizer in optimizers:
        if getattr(optimizer, "is_stub_optimizer", False):
            continue
        precision_aware = bool(optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)
        for param, holder in _model_and_main_params(optimizer):
            parameter = by_param[param]
            start, stop = 0, param.numel()
            if isinstance(optimizer, DistributedOptimizer):
                shard = optimizer._get_model_param_range_map(param)["param"]
                start, stop = shard.start, shard.end
            yield Piece(
                parameter,
                start,
                stop,
                holder,
                grad_name="decoupled_grad" if precision_aware else "grad",
                # `.float()` of an fp32 gradient is that gradient (``_copy_model_grads_to_main_grads``).
                in_place=precision_aware or main_grad_of(param).dtype == torch.float32,
                counted=is_counted(parameter, optimizer, reduction),
            )


def _model_and_main_params(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Pairs of a model parameter and the tensor that the inner optimizer updates in its place."""
    if isinstance(optimizer, DistributedOptimizer):
        precision_aware = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        main_groups = optimizer.shard_float16_groups if precision_aware else optimizer.shard_fp32_from_float16_groups
        pairs = [
            (optimizer.model_float16_groups, main_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ]
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = [
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ]
    elif isinstance(optimizer, FP32Optimizer):
        pairs = [([optimizer.get_parameters()], [optimizer.get_parameters()])]
    else:
        raise TypeError(f"not one of Megatron's supported optimizers: {type(optimizer).__name__}")
    for model_groups, main_groups in pairs:
        yield from zip(chain.from_iterable(model_groups), chain.from_iterable(main_groups), strict=True)


def _adjacent_runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Group pieces that follow each other in one buffer."""

    def position(piece: Piece) -> tuple[int, int]:
        return piece.main_grad.untyped_storage().data_ptr(), int(piece.main_grad.storage_offset())

    runs: list[list[Piece]] = []
    end = (-1, -1)
    for piece in sorted(pieces, key=position):
        storage, offset = position(piece)
        if runs and storage == end[0] and 0 <= offset - end[1] < _BUFFER_ALIGNMENT:
            runs[-1].append(piece)
        else:
            runs.append([piece])
        end = (storage, offset + piece.stop - piece.start)
    return runs


def _span(run: Sequence[Piece]) -> Tensor:
    """One 1-D view over a run of pieces and the padding between them."""
    first, last = run[0].main_grad, run[-1].main_grad
    length = last.storage_offset() + last.numel() - first.storage_offset()
    return first.as_strided((length,), (1,), first.storage_offset())


def _named_segments(run: Sequence[Piece]) -> Iterator[tuple[str, int, bool]]:
    """(block name, elements, counted) over a run; padding goes with the block before it, where it adds zeros."""
    for piece, following in zip(run, [*run[1:], None], strict=True):
        padding = 0
        if following is not None and piece.in_place:
            end = piece.main_grad.storage_offset() + piece.stop - piece.start
            padding = int(following.main_grad.storage_offset() - end)
        runs = list(logical_runs(piece.parameter, piece.start, piece.stop))
        for index, (name, length) in enumerate(runs):
            yield name, length + (padding if index == len(runs) - 1 else 0), piece.counted
