"""Reference passes: gradients of general-capability data through Megatron's own schedules, leaving no trace.

A refresh is a function of the weights and the reference data alone. With refreshes on and the projection off a run is
bitwise the run without the plugin: whatever a forward and backward pass changes beside the gradient (random states,
router statistics, FP8 scales, timers, the watch on NaN) is put back by :func:`no_trace`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import get_model_config
from torch import Tensor
from tqdm import tqdm

from megatron_ogpsa.attributes import attributes_set
from megatron_ogpsa.data.micro_batches import deal_out, micro_batches_at_once
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.plugin import OGPSA
from megatron_ogpsa.precision.first_scales import find_scales
from megatron_ogpsa.precision.fp8_state import fp8_state_kept, starts_without_scales
from megatron_ogpsa.precision.loss_scale import attempts, loss_scaled, next_scale
from megatron_ogpsa.precision.passes_without_fp8 import without_fp8

if TYPE_CHECKING:
    from megatron_ogpsa.data import TokenizedChatDataset, TokenizedPreferenceDataset

MicroBatch = dict[str, Tensor]

LARGEST_LOGITS = "current_max_attn_logits"
"""Where attention keeps them until the step is over (``core/extensions/transformer_engine.py``)."""

PROGRESS_DELAY_SECONDS = 3.0
"""Refreshes that are over sooner show no progress."""


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
    rows: Sequence[MicroBatch],
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
        micro_batches=tuple(_pinned(micro_batch) for micro_batch in micro_batches),
        forward_step=forward_step,
        loss=loss,
        num_samples=dataset.num_samples,
        num_supervised_tokens=dataset.num_supervised_tokens,
        fingerprint=dataset.fingerprint,
        rank=reference_rank,
    )


def _pinned(micro_batch: MicroBatch) -> MicroBatch:
    # Tokenised once and kept for all refreshes: page-locked, so that the copy to the GPU overlaps the pass before it.
    if torch.accelerator.is_available():
        return {key: tensor.pin_memory() for key, tensor in micro_batch.items()}
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

    def run(forward_step: Callable[..., Any], micro_batches: Sequence[MicroBatch], bar: tqdm[NoReturn] | None) -> None:
        # Each time, since Megatron counts by it when a bucket's gradients are there and can be reduced.
        _zero_gradients(chunks, optimizer)
        # Rank 0 is on the first stage, whose first chunk draws every micro-batch.
        iterators = [_watched(micro_batches, bar if chunk is chunks[0] else None) for chunk in chunks]
        forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=decoder_seq_length,
            forward_only=False,
        )

    # Without it Megatron has scaled gradients for a mean over ranks when it built the chunks, which a mean over all tokens
    # is already.
    is_per_token = get_model_config(chunks[0]).calculate_per_token_loss
    finds_scales = is_first_step and not in_bf16 and starts_without_scales(chunks)
    at_once = micro_batches_at_once(get_model_config(chunks[0]))
    few = max(at_once, parallel_state.get_pipeline_model_parallel_world_size())
    number = len(keep) + sum(len(reference.parts) for reference in references)

    def capture_all(loss_scale: float | None) -> list[LossSum]:
        ogpsa.begin_refresh(keep, num_references=number)
        sums: list[LossSum] = []
        with _progress_bar(references) as bar, loss_scaled(chunks, loss_scale):
            for reference in references:
                for name, micro_batches in reference.parts.items():
                    sums.append(LossSum())
                    # Of each on its own: otherwise one would route the next one's tokens.
                    with no_trace(chunks), without_fp8(chunks) if in_bf16 else nullcontext():
                        if finds_scales:
                            with no_trace(chunks, but_for_fp8=True):
                                find_scales(chunks, partial(run, reference.forward_step, micro_batches[:few], None))
                        run(sums[-1].of(reference.forward_step), micro_batches, bar)
                    if not is_per_token:
                        _scale_gradients(
                            chunks, parallel_state.get_data_parallel_world_size(with_context_parallel=True)
                        )
                    ogpsa.capture(name, loss_scale=loss_scale)
        return sums

    sums: list[LossSum] = []
    for loss_scale in attempts(chunks, ogpsa.reference_loss_scale):
        sums = capture_all(loss_scale)
        if loss_scale is not None and ogpsa.captured_are_finite():
            ogpsa.reference_loss_scale = next_scale(loss_scale)
            break
    _zero_gradients(chunks, optimizer)
    return Refreshed(losses=_mean_losses(references, sums), is_new=ogpsa.finish_refresh())


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
    return tqdm(
        total=sum(len(reference.micro_batches) for reference in references),
        desc="OGPSA refresh",
        unit=" micro-batches",
        delay=PROGRESS_DELAY_SECONDS,
        leave=False,
        disable=dist.get_rank() != 0,
    )


def _watched(micro_batches: Sequence[MicroBatch], bar: tqdm[NoReturn] | None) -> Iterator[MicroBatch]:
    for micro_batch in micro_batches:
        yield micro_batch
        if bar is not None:
            bar.update()


def _zero_gradients(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def _scale_gradients(chunks: Sequence[DistributedDataParallel], factor: float) -> None:
    for chunk in chunks:
        chunk.scale_gradients(factor)


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
    """What of Megatron notes what passes do, where it is in use: with nothing noted, or noting nothing."""
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
