"""The forward step that Megatron's schedules call: a micro-batch into the model, and the loss that belongs to it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch

from megatron_ogpsa.integration.inputs.batch import Batch, next_batch
from megatron_ogpsa.losses.output import LossFunction, validated
from megatron_ogpsa.watchdog import progress

BatchLoss = Callable[[Batch], LossFunction]
"""Binds what a loss takes beside the model's output (masks, pairs) to one micro-batch."""

ForwardStep = Callable[[Iterator[dict[str, torch.Tensor]], torch.nn.Module], tuple[torch.Tensor, LossFunction]]


def make_forward_step(loss_of: BatchLoss, *, packed: bool, validate: bool = True) -> ForwardStep:
    """The forward step that Megatron's schedules call once for each micro-batch and model chunk.

    Args:
        loss_of: the loss, for a micro-batch.
        packed: rows hold several documents, which must not attend to each other.
        validate: check the loss through Megatron's rerun state machine and time the batch, as training and evaluation do.
            Passes outside Megatron's training step must say False.
    """

    def forward_step(
        data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        from megatron.core.utils import get_attr_wrapped_model
        from megatron.training import get_args, get_timers

        progress.pulse()
        args = get_args()
        timer = get_timers()("batch-generator", log_level=2) if validate else None
        if timer is not None:
            timer.start()
        batch = None
        if _reads_data(args, packed, get_attr_wrapped_model(model, "vp_stage")):
            batch = next_batch(
                data_iterator, packed=packed, transformer_engine=args.transformer_impl == "transformer_engine"
            )
        if timer is not None:
            timer.stop()
        if batch is None:  # a middle stage gets activations from its neighbour and never calls the loss
            return model(None, None, None, labels=None), _never_called
        output = model(
            batch.tokens,
            batch.position_ids,
            batch.attention_mask,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed_seq_params,
        )
        loss = loss_of(batch)
        return output, validated(loss) if validate else loss

    return forward_step


def _never_called(token_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    raise RuntimeError("a loss was asked for on a pipeline stage that is not the last")


def _reads_data(args: argparse.Namespace, packed: bool, vp_stage: int | None) -> bool:
    """Whether this pipeline stage needs the batch: the ends do, and every stage that keeps packed documents apart.

    Each such rank reads the memory-mapped data set itself; that is cheaper than a broadcast over the tensor-parallel
    group, and the order of samples depends on the data-parallel rank alone.
    """
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return bool(packed or args.mtp_num_layers or is_first_or_last_pipeline_stage(vp_stage))
