"""The references of ``--ogpsa-reference``, tokenised and dealt out to this rank."""

from __future__ import annotations

import argparse

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.agreement import agreed
from megatron_ogpsa.references import Reference, cut_reference


def load_references(args: argparse.Namespace) -> list[Reference]:
    """Read every reference; each keeps its first ``--ogpsa-reference-samples`` conversations. Collective.

    Raises:
        UserError: on all ranks alike: a source cannot be read or has no supervised token; the message names the
            reference.
    """
    return [_load(args, name, source) for name, source in args.ogpsa_reference]


def _load(args: argparse.Namespace, name: str, source: str) -> Reference:
    from megatron.core import parallel_state

    from megatron_ogpsa.integration.sft import load_on_all_ranks

    try:
        dataset = load_on_all_ranks(source, args.ogpsa_reference_samples)
    except UserError as error:
        raise UserError(f"--ogpsa-reference {name}: {error}") from None
    is_interleaved = args.virtual_pipeline_model_parallel_size is not None
    return agreed(
        lambda: cut_reference(
            name,
            dataset,
            micro_batch_size=args.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            multiple=args.pipeline_model_parallel_size if is_interleaved else 1,
        )
    )
