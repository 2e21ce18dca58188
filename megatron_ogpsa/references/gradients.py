"""Reference passes: gradients of general-capability data through Megatron's own schedules, leaving no trace.

A refresh is a function of the weights and the reference data alone. With refreshes on and the projection off a run is
bitwise the run without the plugin: see :mod:`megatron_ogpsa.references.one_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config
from torch import Tensor
from tqdm import tqdm

from megatron_ogpsa.console.progress import progress_bar
from megatron_ogpsa.data.micro_batches import Rows, deal_out, micro_batches_at_once
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.plugin.ogpsa import OGPSA
from megatron_ogpsa.precision.first_scales import find_scales
from megatron_ogpsa.precision.fp8_state import starts_without_scales
from megatron_ogpsa.precision.loss_scale import attempts, loss_scaled, next_scale
from megatron_ogpsa.precision.passes_without_fp8 import without_fp8
from megatron_ogpsa.references.one_pass import no_trace, reference_pass

if TYPE_CHECKING:
    from megatron_ogpsa.data import TokenizedChatDataset, TokenizedPreferenceDataset

MicroBatch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A named data set with a loss, cut into this rank's micro-batches.

    Attributes:
        rank: gradients that it gives, of as many consecutive parts of the micro-batches, which hold disjoint samples.
        micro_batches: collated on the host, [micro-batch, sequence] each; the same number on every data-parallel rank.
        forward_step: as Megatron's, with a loss function that returns (sum, number, report) and leaves alone the rerun
            state machine, which accepts results only inside Megatron's own training step.
        loss: what the forward step's loss is called.
        num_samples, num_supervised_tokens: of the whole reference, on all ranks together.
        fingerprint: of data, tokenizer and template (SHA-256).
    """

    name: str
    micro_batches: tuple[MicroBatch, ...]
    forward_step: Callable[..., Any]
    loss: str
    num_samples: int
    num_supervised_tokens: int
    fingerprint: str
    rank: int = 1

    @property
    def parts(self) -> dict[str, tuple[MicroBatch, ...]]:
        """The micro-batches of each gradient by its name: the reference's own, or ``name (2/4)``."""
        if self.rank == 1:
            return {self.name: self.micro_batches}
        length = len(self.micro_batches) // self.rank
        return {
            f"{self.name} ({part + 1}/{self.rank})": self.micro_batches[part * length : (part + 1) * length]
            for part in range(self.rank)
        }


def cut_reference(
    name: str,
    rows: Rows,
    dataset: TokenizedChatDataset | TokenizedPreferenceDataset,
    *,
    forward_step: Callable[..., Any],
    loss: str,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    multiple: int = 1,
    reference_rank: int = 1,
) -> Reference:
    """Deal the rows of a reference out to data-parallel ranks and micro-batches.

    Args:
        rows: of ``dataset``, which is already cut to the number of samples that the reference is to have.
        multiple: micro-batches per rank and part must be a multiple of this (``micro_batches_at_once``).
        reference_rank: parts whose gradients are taken on their own.

    Raises:
        UserError: too few rows for so many parts; one would be empty.
    """
    micro_batches = deal_out(
        rows,
        micro_batch_size=micro_batch_size,
        rank=data_parallel_rank,
        size=data_parallel_size,
        multiple=multiple * reference_rank,
    )
    # Rows are dealt out in order, so that each part is a run of them, and the rows that fill up stand at the end.
    rows_of_part = len(micro_batches) // reference_rank * micro_batch_size * data_parallel_size
    if len(rows) <= (reference_rank - 1) * rows_of_part:
        raise UserError(
            f"--ogpsa-rank-per-reference {reference_rank}: reference {name} has {len(rows)} rows, of which a part takes "
            f"{rows_of_part} here, so that the last is empty; give it more samples, or use a smaller rank or "
            "--micro-batch-size"
        )
    return Reference(
        name=name,
        micro_batches=tuple(pinned(micro_batch) for micro_batch in micro_batches),
        forward_step=forward_step,
        loss=loss,
        num_samples=dataset.num_samples,
        num_supervised_tokens=dataset.num_supervised_tokens,
        fingerprint=dataset.fingerprint,
        rank=reference_rank,
    )


def pinned(micro_batch: MicroBatch) -> MicroBatch:
    """Page-locked where there is a GPU: kept for all refreshes, so that each copy overlaps the pass before it."""
    if torch.accelerator.is_available():
        return {key: tensor.pin_memory() if tensor.is_cpu else tensor for key, tensor in micro_batch.items()}
    return micro_batch


@dataclass(frozen=True, kw_only=True)
class Refreshed:
    """What a refresh found.

    Attributes:
        is_new: whether the basis is new; false if a reference gradient was not finite, on all ranks alike.
        losses: the loss of each part of each reference as its gradient was taken, and the number that it is a mean over;
            empty on ranks that do not hold the last pipeline stage.
    """

    is_new: bool
    losses: dict[str, dict[str, MeanLoss]]


@dataclass(frozen=True)
class MeanLoss:
    """A mean over so many tokens, or pairs."""

    value: float
    number: float


def refresh(
    ogpsa: OGPSA,
    references: Sequence[Reference],
    *,
    optimizer: MegatronOptimizer,
    chunks: Sequence[DistributedDataParallel],
    forward_backward: Callable[..., Any],
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    is_first_step: bool = False,
    in_bf16: bool = False,
    keep: Sequence[str] = (),
) -> Refreshed:
    """Compute the reference gradients as training gradients are computed, and give the plugin its new basis.

    Each gradient finds the same random states, expert biases and counts, so that it does not depend on which come before
    it.

    Args:
        forward_backward: Megatron's schedule for this layout (``get_forward_backward_func``).
        is_first_step: whether the model has not been trained in this run. FP8 scales that follow from earlier passes do
            not fit then, so that each reference gradient is taken after short passes that find some.
        in_bf16: take no layer in FP8, of a model that is trained in it: nearer to what is to be protected, for the time and
            the activations of passes in bf16.
        keep: names of gradients that the plugin takes out of its basis instead, of other references than these.
    """

    finds_scales = is_first_step and not in_bf16 and starts_without_scales(chunks)
    passes = _Passes(
        optimizer, chunks, forward_backward, seq_length, micro_batch_size, decoder_seq_length, finds_scales, in_bf16
    )
    number = len(keep) + sum(len(reference.parts) for reference in references)
    sums: list[LossSum] = []
    for loss_scale in attempts(chunks, ogpsa.reference_loss_scale):
        ogpsa.begin_refresh(keep, num_references=number)
        sums = passes.capture(ogpsa, references, loss_scale)
        if loss_scale is not None and ogpsa.captured_are_finite():
            ogpsa.reference_loss_scale = next_scale(loss_scale)
            break
    passes.zero_gradients()
    return Refreshed(losses=_mean_losses(references, sums), is_new=ogpsa.finish_refresh())


@dataclass(frozen=True)
class _Passes:
    """How the gradients of a refresh are taken; fields as the arguments of :func:`refresh`."""

    optimizer: MegatronOptimizer
    chunks: Sequence[DistributedDataParallel]
    forward_backward: Callable[..., Any]
    seq_length: int
    micro_batch_size: int
    decoder_seq_length: int | None
    finds_scales: bool
    in_bf16: bool

    def capture(self, ogpsa: OGPSA, references: Sequence[Reference], loss_scale: float | None) -> list[LossSum]:
        """Give the plugin the gradient of each part of each reference, and return their losses."""
        sums: list[LossSum] = []
        with _progress_bar(references) as bar, loss_scaled(self.chunks, loss_scale):
            for reference in references:
                for name, micro_batches in reference.parts.items():
                    sums.append(LossSum())
                    # Of each on its own: otherwise one would route the next one's tokens.
                    with reference_pass(self.chunks), without_fp8(self.chunks) if self.in_bf16 else nullcontext():
                        if self.finds_scales:
                            self._find_scales(reference.forward_step, micro_batches)
                        self._run(sums[-1].of(reference.forward_step), micro_batches, bar)
                    ogpsa.capture(name, loss_scale=loss_scale)
        return sums

    def _find_scales(self, forward_step: Callable[..., Any], micro_batches: Sequence[MicroBatch]) -> None:
        at_once = micro_batches_at_once(get_model_config(self.chunks[0]))
        few = max(at_once, parallel_state.get_pipeline_model_parallel_world_size())
        with no_trace(self.chunks, but_for_fp8=True):
            find_scales(self.chunks, partial(self._run, forward_step, micro_batches[:few], None))

    def _run(
        self, forward_step: Callable[..., Any], micro_batches: Sequence[MicroBatch], bar: tqdm[NoReturn] | None
    ) -> None:
        # Each time, since Megatron counts by it when a bucket's gradients are there and can be reduced.
        self.zero_gradients()
        # Rank 0 is on the first stage, whose first chunk draws every micro-batch.
        iterators = [_watched(micro_batches, bar if chunk is self.chunks[0] else None) for chunk in self.chunks]
        self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=list(self.chunks),
            num_microbatches=len(micro_batches),
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            decoder_seq_length=self.decoder_seq_length,
            forward_only=False,
        )

    def zero_gradients(self) -> None:
        """As Megatron's training step begins."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()


class LossSum:
    """The sum of a loss over micro-batches, and the number that it is a sum of, on one rank of the last stage."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def of(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """``forward_step`` with a loss function that also adds up here; the loss stays on its device."""

        def adding(*args: Any, **kwargs: Any) -> Any:
            output, loss = forward_step(*args, **kwargs)

            def added(*loss_args: Any, **loss_kwargs: Any) -> Any:
                result = loss(*loss_args, **loss_kwargs)
                self.parts.append(torch.stack((result[0].detach().double(), result[1].double())))
                return result

            return output, added

        return adding


def _mean_losses(references: Sequence[Reference], sums: Sequence[LossSum]) -> dict[str, dict[str, MeanLoss]]:
    """Means over all samples, on ranks of the last stage, whose data-parallel group adds them in one all-reduce."""
    if not all(loss.parts for loss in sums):
        return {}
    table_K2 = torch.stack([torch.stack(loss.parts).sum(dim=0) for loss in sums])
    dist.all_reduce(table_K2, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    means = iter([MeanLoss(total / number, number) for total, number in table_K2.tolist()])
    return {reference.name: {part: next(means) for part in reference.parts} for reference in references}


def _progress_bar(references: Sequence[Reference]) -> tqdm[NoReturn]:
    """Micro-batches of a refresh with the time left; rank 0 shows it, if the refresh takes more than a moment."""
    number = sum(len(reference.micro_batches) for reference in references)
    return progress_bar("OGPSA refresh", number, " micro-batches", is_shown=dist.get_rank() == 0)


def _watched(micro_batches: Sequence[MicroBatch], bar: tqdm[NoReturn] | None) -> Iterator[MicroBatch]:
    for micro_batch in micro_batches:
        yield micro_batch
        if bar is not None:
            bar.update()
