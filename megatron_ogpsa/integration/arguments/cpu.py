"""Megatron's flags on a machine without a GPU: other defaults, and refusals of what cannot run there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ogpsa.errors import UserError


def set_cpu_defaults(parser: argparse.ArgumentParser) -> None:
    """Change the defaults of Megatron's parser to what runs on the CPU; flags that the user gives still win.

    Thus one configuration serves both: what it leaves open is chosen by the machine.
    """
    from megatron.core.transformer.enums import AttnBackend

    parser.set_defaults(
        distributed_backend="gloo",
        use_cpu_initialization=True,
        transformer_impl="local",
        attention_backend=AttnBackend.unfused,
        # Fusions are CUDA kernels, or are compiled with a compiler that a plain machine does not have.
        gradient_accumulation_fusion=False,
        bias_gelu_fusion=False,
        bias_swiglu_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        no_persist_layer_norm=True,
        create_attention_mask_in_dataloader=False,
        # Two worker processes for each rank would outnumber the cores that do the arithmetic.
        num_workers=0,
    )


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A request that the CPU runtime cannot serve: how to recognise it, what it is called, and the remedy."""

    flag: str
    applies: Callable[[argparse.Namespace], bool]
    remedy: str


_REFUSALS = (
    Refusal(
        flag="--transformer-impl transformer_engine",
        applies=lambda args: args.transformer_impl != "local",
        remedy="leave it out or say --transformer-impl local",
    ),
    Refusal(
        flag="--fp8-format",
        applies=lambda args: bool(args.fp8),
        remedy="use --bf16 or full precision",
    ),
    Refusal(
        flag="--fp4-format",
        applies=lambda args: bool(getattr(args, "fp4", None)),
        remedy="use --bf16 or full precision",
    ),
    Refusal(
        flag="--context-parallel-size",
        applies=lambda args: args.context_parallel_size > 1,
        remedy="use --context-parallel-size 1: its attention is Transformer Engine's",
    ),
    Refusal(
        flag="--multi-latent-attention",
        applies=lambda args: args.multi_latent_attention,
        remedy="it needs Transformer Engine's attention, Megatron's own does not take the sizes of its heads",
    ),
    Refusal(
        flag="--sequence-parallel",
        applies=lambda args: args.sequence_parallel,
        remedy="leave it out: Megatron's torch norm does not support it",
    ),
    Refusal(
        flag="--moe-token-dispatcher-type",
        applies=lambda args: args.num_experts is not None and args.moe_token_dispatcher_type != "allgather",
        remedy="use --moe-token-dispatcher-type allgather: gloo has no uneven all-to-all",
    ),
    Refusal(
        flag="--moe-grouped-gemm",
        applies=lambda args: args.moe_grouped_gemm,
        remedy="leave it out: the grouped product is a CUDA kernel",
    ),
    Refusal(
        flag="--cuda-graph-impl",
        applies=lambda args: args.cuda_graph_impl != "none",
        remedy="leave it out",
    ),
    Refusal(
        flag="--distributed-backend nccl",
        applies=lambda args: args.distributed_backend != "gloo",
        remedy="leave it out or say --distributed-backend gloo",
    ),
)


def check_supported_on_cpu(args: argparse.Namespace) -> None:
    """Refuse, by the name of the flag, what cannot run without a GPU.

    Raises:
        UserError: naming the first such flag and the remedy.
    """
    for refusal in _REFUSALS:
        if refusal.applies(args):
            raise UserError(f"{refusal.flag} needs a GPU, and none was found: {refusal.remedy}")
