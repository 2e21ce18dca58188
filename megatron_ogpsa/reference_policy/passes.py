"""Forward-only passes through Megatron's schedules that give the log-probability of every answer.

Shape legend: B = rows of a micro-batch, P = pairs that a row has room for, N = pairs of all data sets together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.utils.data import Dataset, Subset

from megatron_ogpsa.data.micro_batches import Rows, deal_out
from megatron_ogpsa.precision.fp8_state import adopt_forward_scales, starts_without_scales
from megatron_ogpsa.reference_policy.store import LogProbs
from megatron_ogpsa.references.gradients import MicroBatch
from megatron_ogpsa.references.one_pass import no_trace

MICRO_BATCHES_PER_STAGE = 16
"""Micro-batches of a round, for each pipeline stage: the pipeline is full most of the time, and an interrupted
computation loses no more than this."""


class NotFiniteError(Exception):
    """A log-probability is not finite, in words that name the pair."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How this layout runs a forward pass.

    Attributes:
        chunks: this rank's model chunks.
        forward_step: as Megatron's; its loss gives (pair ids [B, P], log-probabilities [B, P, 2]) for each micro-batch.
        forward_backward: Megatron's schedule (``get_forward_backward_func``).
        multiple: number of which micro-batches of a pass must be a multiple.
    """

    chunks: Sequence[torch.nn.Module]
    forward_step: Callable[..., Any]
    forward_backward: Callable[..., Any]
    seq_length: int
    micro_batch_size: int
    multiple: int
    decoder_seq_length: int | None = None

    @property
    def rows_per_round(self) -> int:
        """Rows that all data-parallel ranks take in one round."""
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        data_parallel_size = parallel_state.get_data_parallel_world_size()
        return MICRO_BATCHES_PER_STAGE * stages * self.micro_batch_size * data_parallel_size

    def collect(self, rows: Rows) -> list[Any]:
        """What the forward step's loss gives for each of this data-parallel rank's micro-batches of ``rows``.

        Empty but on the last pipeline stage, whose tensor-parallel ranks all have the same. Collective over the ranks of
        a pipeline. Does not change the model's mode, and leaves what a forward pass leaves.
        """
        return self._forward(self._dealt_out(rows))

    def run(self, rows: Rows, num_pairs: int) -> tuple[Tensor, Tensor]:
        """log π of the answers in ``rows``; collective over all ranks, which get the same.

        Returns:
            fp64 [N, 2], and bool [N]: which pairs it holds; both on the host.
        """
        micro_batches = self._dealt_out(rows)
        with no_trace(self.chunks), _evaluating(self.chunks):
            if starts_without_scales(self.chunks):
                few = max(self.multiple, parallel_state.get_pipeline_model_parallel_world_size())
                self._forward(micro_batches[:few])
                adopt_forward_scales()
            outputs = self._forward(micro_batches)
        return _gathered(outputs, num_pairs, next(self.chunks[0].parameters()).device)

    def _dealt_out(self, rows: Rows) -> list[MicroBatch]:
        return deal_out(
            rows,
            micro_batch_size=self.micro_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            size=parallel_state.get_data_parallel_world_size(),
            multiple=self.multiple,
        )

    @torch.no_grad()
    def _forward(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        iterators = [iter(micro_batches) for _ in self.chunks]
        outputs: list[Any] = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(self.chunks),
            num_microbatches=len(micro_batches),
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            decoder_seq_length=self.decoder_seq_length,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return outputs


def _gathered(outputs: Sequence[tuple[Tensor, Tensor]], num_pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Put the ranks' answers together. Every pair is on one data-parallel rank; of its copies one speaks."""
    table_N3 = torch.zeros(num_pairs, 3, dtype=torch.float64, device=device)
    if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
        ids = torch.cat([pair_ids.flatten() for pair_ids, _ in outputs])
        values_I2 = torch.cat([log_probs.flatten(0, 1) for _, log_probs in outputs])
        exists = ids >= 0
        table_N3[ids[exists], :2] = values_I2[exists]
        table_N3[ids[exists], 2] = 1.0
    dist.all_reduce(table_N3)
    table_N3 = table_N3.cpu()
    return table_N3[:, :2], table_N3[:, 2] == 1.0


@contextmanager
def _evaluating(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Without dropout: the reference policy is the model, not a random thinning of it."""
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)


def complete(
    log_probs: LogProbs,
    rows: Dataset[MicroBatch],
    row_of_pair_N: Tensor,
    passes: Passes,
    *,
    after_round: Callable[[LogProbs, int], None],
) -> LogProbs:
    """Compute what is not known yet, round by round. Collective.

    Args:
        rows: all rows of the data sets, pairs numbered through. Each rank reads its own share alone.
        row_of_pair_N: int64, the row that each pair is in.
        after_round: gets what is known so far and the number of pairs of the round.

    Raises:
        NotFiniteError: a log-probability is not finite; names the pair. On all ranks alike.
    """
    missing: list[int] = row_of_pair_N[~log_probs.is_known_N].unique(sorted=True).tolist()
    for start in range(0, len(missing), passes.rows_per_round):
        chosen = Subset(rows, missing[start : start + passes.rows_per_round])
        values_N2, is_new_N = passes.run(chosen, len(log_probs.values_N2))
        is_bad_N = is_new_N & ~values_N2.isfinite().all(dim=1)
        if is_bad_N.any():
            raise NotFiniteError(f"pair {int(is_bad_N.nonzero()[0])}")
        log_probs = log_probs.with_round(values_N2, is_new_N)
        after_round(log_probs, int(is_new_N.sum()))
    return log_probs
