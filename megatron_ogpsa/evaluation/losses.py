"""The loss of a data set by forward-only passes through Megatron's schedules, the same number in any layout.

Sums over tokens and pairs are taken in fp64 and divided once at the end, so that it does not matter how rows are dealt out.
Rows that fill up the last micro-batch have no supervised token and no pair, and add nothing.

Shape legend: B = rows of a micro-batch, S = sequence, P = pairs that a row has room for; [..., 2] is (chosen, rejected).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.utils.data import Subset

from megatron_ogpsa.console.progress import progress_bar
from megatron_ogpsa.data import TokenizedChatDataset, TokenizedPreferenceDataset
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.checkpoints.loaded_model import LoadedModel
from megatron_ogpsa.integration.inputs.batch import Batch
from megatron_ogpsa.integration.inputs.forward import make_forward_step
from megatron_ogpsa.losses.preference import answer_log_probs, chosen_mask
from megatron_ogpsa.reference_policy.passes import Passes

Dataset = TokenizedChatDataset | TokenizedPreferenceDataset

_CHAT_SUMS = ("loss", "tokens")
_PAIR_SUMS = ("loss", "tokens", "chosen", "rejected", "preferred", "pairs")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a model's loss on a data set is.

    Attributes:
        samples: conversations, or pairs, each counted once.
        tokens: supervised tokens; of pairs those of the chosen answers.
        loss: mean of −log p(token | tokens before it) over these, in nats.
        cut: samples that were longer than the sequence, and lost their end or the start of their prompt.
        chosen, rejected: of pairs, mean log-probability of an answer (a sum over its tokens).
        preferred: of pairs, share whose chosen answer is the more probable one.
    """

    samples: int
    tokens: int
    loss: float
    cut: int
    chosen: float | None = None
    rejected: float | None = None
    preferred: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is more than a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def margin(self) -> float | None:
        """Of pairs: mean of log p(chosen) − log p(rejected)."""
        return None if self.chosen is None or self.rejected is None else self.chosen - self.rejected


def measure(model: LoadedModel, name: str, dataset: Dataset) -> Loss:
    """The loss of the model on every sample of ``dataset``. Collective over all ranks, which get the same.

    Args:
        name: of the data set, for progress and messages.

    Raises:
        UserError: the loss is not finite; on all ranks alike.
    """
    is_pairs = isinstance(dataset, TokenizedPreferenceDataset)
    names = _PAIR_SUMS if is_pairs else _CHAT_SUMS
    args = model.args
    passes = Passes(
        chunks=[model.module],
        forward_step=make_forward_step(
            _pair_sums if is_pairs else _chat_sums, packed=is_pairs or args.ogpsa_packing, validate=False
        ),
        forward_backward=get_forward_backward_func(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        multiple=1,
        decoder_seq_length=args.decoder_seq_length,
    )
    totals = torch.zeros(len(names), dtype=torch.float64, device=next(model.module.parameters()).device)
    with progress_bar(f"loss on {name}", len(dataset), " rows", is_shown=dist.get_rank() == 0) as bar:
        for start in range(0, len(dataset), passes.rows_per_round):
            rows = Subset(dataset, range(start, min(start + passes.rows_per_round, len(dataset))))
            for sums in passes.collect(rows):
                totals += sums
            bar.update(len(rows))
    # Of the tensor-parallel copies on the last stage one speaks; other stages have collected nothing.
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        totals.zero_()
    dist.all_reduce(totals)
    if not totals.isfinite().all():
        raise UserError(f"--data {name}: the loss is not finite: check the weights that were loaded")
    return _loss_of(dict(zip(names, totals.tolist(), strict=True)), dataset)


def _loss_of(sums: Mapping[str, float], dataset: Dataset) -> Loss:
    pairs = sums.get("pairs")
    if pairs is not None and pairs != dataset.num_samples:
        raise RuntimeError(f"{pairs:g} pairs were counted, of {dataset.num_samples}")
    return Loss(
        samples=dataset.num_samples,
        tokens=int(sums["tokens"]),
        loss=sums["loss"] / sums["tokens"],
        cut=dataset.summary.num_end_cut + dataset.summary.num_prompt_cut,
        chosen=sums["chosen"] / pairs if pairs else None,
        rejected=sums["rejected"] / pairs if pairs else None,
        preferred=sums["preferred"] / pairs if pairs else None,
    )


def _chat_sums(batch: Batch) -> Any:
    """In place of a loss: gives the schedule (Σ m ℓ, Σ m), which it collects."""

    def collect(token_loss_BS: Tensor, non_loss_data: bool = True) -> Tensor:
        return _masked_sums(token_loss_BS, batch.loss_mask)

    return collect


def _pair_sums(batch: Batch) -> Any:
    """As :func:`_chat_sums` over chosen answers, then Σ log p of both answers, how often the chosen one's is more, pairs."""

    def collect(token_loss_BS: Tensor, non_loss_data: bool = True) -> Tensor:
        assert batch.pair_ids is not None
        exists_BP = batch.pair_ids >= 0
        log_probs_BP2 = answer_log_probs(token_loss_BS, batch.loss_mask, batch.document_ids, exists_BP.shape[1])
        log_probs_N2 = log_probs_BP2[exists_BP]
        preferred = (log_probs_N2[:, 0] > log_probs_N2[:, 1]).double().sum()
        own = _masked_sums(token_loss_BS, chosen_mask(batch.loss_mask, batch.document_ids))
        return torch.cat([own, log_probs_N2.sum(dim=0), torch.stack([preferred, exists_BP.double().sum()])])

    return collect


def _masked_sums(token_loss_BS: Tensor, mask_BS: Tensor) -> Tensor:
    mask_BS = mask_BS.double()
    return torch.stack([(token_loss_BS.double() * mask_BS).sum(), mask_BS.sum()])
