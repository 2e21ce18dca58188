"""The references of ``--ogpsa-reference``, tokenised, given a loss and dealt out to this rank."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_ogpsa.data.micro_batches import micro_batches_at_once
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.inputs.datasets import load_conversations, load_pairs
from megatron_ogpsa.integration.inputs.forward import BatchLoss, make_forward_step
from megatron_ogpsa.integration.projection import authors
from megatron_ogpsa.integration.ranks.agreement import agreed
from megatron_ogpsa.integration.ranks.turns import told_by_rank_0
from megatron_ogpsa.losses.preference import chosen_mask
from megatron_ogpsa.losses.sft import summed_token_loss
from megatron_ogpsa.references.gradients import Reference, cut_reference

if TYPE_CHECKING:
    from megatron_ogpsa.integration.reference_policy import ReferencePolicy

DEFAULT_LOSS = {"sft": "nll", "dpo": "nll_chosen"}
"""By stage. What the authors' code does in its DPO stage is ``nll_pair``, which also protects rejected answers."""

_TOKEN_LOSSES: dict[str, BatchLoss] = {
    "nll": lambda batch: partial(summed_token_loss, loss_mask=batch.loss_mask),
    "nll_pair": lambda batch: partial(summed_token_loss, loss_mask=batch.loss_mask),
    "nll_chosen": lambda batch: partial(summed_token_loss, loss_mask=chosen_mask(batch.loss_mask, batch.document_ids)),
}


def loss_of_reference(args: argparse.Namespace, name: str) -> str:
    """``--ogpsa-reference-loss`` for this reference; the last one that names it, or that names none, holds."""
    given = dict(args.ogpsa_reference_loss)
    default = (authors.REFERENCE_LOSS if args.ogpsa_authors_rule else DEFAULT_LOSS)[args.ogpsa_stage]
    return str(given.get(name, given.get(None, default)))


def reference_loader(args: argparse.Namespace, policy: ReferencePolicy | None) -> Callable[[str, str], Reference]:
    """How to load a reference by name and source: its first ``--ogpsa-reference-samples`` samples.

    The function is collective and raises UserError on all ranks alike: a source cannot be read, has no supervised token,
    or is of the wrong kind for its loss; the message names the reference.

    Args:
        policy: of a DPO stage; without one the loss ``dpo`` is refused.
    """
    return partial(_load, args, policy)


def _load(args: argparse.Namespace, policy: ReferencePolicy | None, name: str, source: str) -> Reference:
    from megatron.core import parallel_state

    from megatron_ogpsa.data import source_kind

    loss = loss_of_reference(args, name)
    wanted = "chat" if loss == "nll" else "preference"

    try:
        if loss == "dpo" and policy is None:
            raise UserError("the loss dpo needs a reference policy: use --ogpsa-stage dpo, or another loss")
        kind = told_by_rank_0(lambda: source_kind(source), f"reading {source}")
        if kind != wanted:
            other = "nll" if kind == "chat" else "nll_chosen"
            raise UserError(
                f"{source} holds {kind} data, which --ogpsa-reference-loss {loss} does not take: "
                f"say --ogpsa-reference-loss {name}={other}"
            )
        dataset: Any = (load_conversations if wanted == "chat" else load_pairs)(source, args.ogpsa_reference_samples)
    except UserError as error:
        raise type(error)(f"--ogpsa-reference {name}: {error}") from None  # one that may pass stays one
    rows: Any = dataset
    if loss == "dpo":
        assert policy is not None
        rows = policy.numbered(dataset)
    loss_of = policy.loss_of if loss == "dpo" and policy is not None else _TOKEN_LOSSES[loss]
    return agreed(
        lambda: cut_reference(
            name,
            rows,
            dataset,
            forward_step=make_forward_step(
                loss_of, packed=wanted == "preference" or args.ogpsa_packing, validate=False
            ),
            loss=loss,
            micro_batch_size=args.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            multiple=micro_batches_at_once(args),
            reference_rank=args.ogpsa_rank_per_reference,
        )
    )
