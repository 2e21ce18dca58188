"""Flags of a run, checked for a cluster that is not there: our explanation first, then Megatron's own validation."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace

from megatron_ogpsa.errors import UserError, one_line
from megatron_ogpsa.integration.arguments.parser import add_training_arguments, parse_flags
from megatron_ogpsa.planning.layout import Dimensions, Mesh, nearest, problem
from megatron_ogpsa.refusal import Refusal, refuse

_PLANNED = "only Megatron's GPT models of plain or latent attention are"
UNPLANNED = tuple(
    Refusal(flag, _PLANNED, "train unplanned")
    for flag in ("--hybrid-layer-pattern", "--spec", "--experimental-attention-variant")
)


def cluster_arguments(flags: list[str], world_size: int) -> argparse.Namespace:
    """Megatron's validated arguments for ``world_size`` ranks; no globals are set, no data and no tokenizer are needed.

    Raises:
        UserError: a wrong flag, or a layout that does not come out even, with the nearest that does.
        UnsupportedError: a model that is no GPT, or a flag with which projection is refused.
    """
    from megatron_ogpsa.integration.arguments.loop import check_before_validation, require_flags
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments
    from megatron_ogpsa.integration.arguments.stage import check_arguments

    early = parse_flags(flags)
    check_before_validation(early, is_here=False)
    if not early.ogpsa_reference:
        raise UserError("--ogpsa-reference is missing: without references there is nothing to plan")
    refuse(UNPLANNED, early, " cannot be planned")
    require_flags(early, for_training=False)
    require_even_layout(early, world_size)
    args = megatron_arguments(flags, world_size)
    args.vocab_size = _vocabulary(args)
    check_arguments(args)
    check_projection_arguments(args)
    return args


def megatron_arguments(flags: list[str], world_size: int) -> argparse.Namespace:
    """What Megatron's own parser and validation make of ``flags`` on ``world_size`` ranks; no globals are set.

    Raises:
        UserError: Megatron refuses them.
    """
    from megatron.training.arguments import parse_args, validate_args

    try:
        # Megatron's parser reads the command line and the ranks' variables, and prints all arguments.
        with _as_first_rank(flags, world_size), redirect_stdout(io.StringIO()):
            args = parse_args(extra_args_provider=add_training_arguments)
            validate_args(args, {})
    except (AssertionError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"Megatron refuses these flags on {world_size} ranks: {one_line(error)}") from error
    return args


@contextmanager
def _as_first_rank(flags: list[str], world_size: int) -> Iterator[None]:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    # Ranks get it where Megatron demands it (cli/connections.py); what the user has set stays, and may be refused.
    variables["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    before, argv = {name: os.environ.get(name) for name in variables}, sys.argv
    os.environ |= variables
    sys.argv = [argv[0], *flags]
    try:
        yield
    finally:
        sys.argv = argv
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def require_even_layout(args: argparse.Namespace, world_size: int) -> None:
    """Refuse a layout that does not come out even.

    Args:
        args: parsed, not validated.

    Raises:
        UserError: the reason, and the flags of the nearest layout on the same number of ranks.
    """
    model, mesh = dimensions(args), mesh_of(args, world_size)
    reason = problem(model, mesh)
    if reason is not None:
        raise UserError(f"{reason}; {nearest_in_words(model, mesh)}")


def nearest_in_words(model: Dimensions, mesh: Mesh) -> str:
    """The flags of the nearest layout on the same number of ranks that comes out even, as a remedy."""
    near = nearest(model, mesh)
    if near is None:
        return f"no layout on {mesh.world} GPUs comes out even: change the model or the cluster"
    other_model, other = near
    changes = [
        f"--{flag} {getattr(other, name)}"
        for name, flag in (
            ("tensor", "tensor-model-parallel-size"),
            ("pipeline", "pipeline-model-parallel-size"),
            ("context", "context-parallel-size"),
            ("expert", "expert-model-parallel-size"),
            ("expert_tensor", "expert-tensor-parallel-size"),
        )
        if getattr(other, name) != getattr(mesh, name)
    ]
    if other.virtual != mesh.virtual:
        changes.append("no virtual stages")
    if other_model.global_batch != model.global_batch:
        changes.append(f"--global-batch-size {other_model.global_batch}")
    return f"the nearest that works: {', '.join(changes)} (data parallel {other.data})"


def dimensions(args: argparse.Namespace) -> Dimensions:
    """Of the model and its batch, from parsed arguments.

    Raises:
        UserError: a size without a default is missing.
    """
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        if getattr(args, name) is None:
            raise UserError(
                f"--{name.replace('_', '-')} is missing: the model's and the batch's sizes have no defaults"
            )
    ffn = args.ffn_hidden_size or _default_ffn(args)
    uneven = (
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.account_for_embedding_in_pipeline_split,
        args.account_for_loss_in_pipeline_split,
        args.pipeline_model_parallel_layout,
    )
    return Dimensions(
        layers=args.num_layers,
        heads=args.num_attention_heads,
        query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        ffn=ffn,
        experts=args.num_experts or 0,
        expert_ffn=args.moe_ffn_hidden_size or ffn,
        seq_length=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        even_stages=not any(uneven),
    )


def _default_ffn(args: argparse.Namespace) -> int:
    # Megatron's own default (training/arguments.py).
    return int(4 * args.hidden_size * 2 / 3) // 64 * 64 if args.swiglu else 4 * args.hidden_size


def mesh_of(args: argparse.Namespace, world_size: int) -> Mesh:
    """The layout of ``world_size`` ranks that parsed arguments ask for."""
    mesh = Mesh(
        world=world_size,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=(args.expert_tensor_parallel_size or args.tensor_model_parallel_size) if args.num_experts else 1,
    )
    if args.num_virtual_stages_per_pipeline_rank:
        return replace(mesh, virtual=args.num_virtual_stages_per_pipeline_rank)
    per_chunk = args.num_layers_per_virtual_pipeline_stage
    if per_chunk and args.num_layers % (mesh.pipeline * per_chunk) == 0:
        return replace(mesh, virtual=args.num_layers // (mesh.pipeline * per_chunk))
    return mesh


def _vocabulary(args: argparse.Namespace) -> int:
    """Tokens, from ``--vocab-size`` or from the tokenizer where it is at hand."""
    if args.vocab_size or args.padded_vocab_size:
        return int(args.vocab_size or args.padded_vocab_size)
    from megatron_ogpsa.data import load_chat_tokenizer

    try:
        return load_chat_tokenizer(args.tokenizer_type, args.tokenizer_model, args.chat_template).vocab_size
    except UserError as error:
        raise UserError(f"--vocab-size is missing: give it, or a tokenizer that tells it ({error})") from None
