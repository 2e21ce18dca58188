"""Which FP8 a run may ask for: by its flags, by Transformer Engine, and by the GPU."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.refusal import Refusal, refuse

AVAILABILITY = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
"""Recipe of ``--fp8-recipe`` → Transformer Engine's own question to the GPU, which answers (bool, reason)."""

MODULE_METHODS = ("get_fp8_meta_tensors", "reset_fp8_meta_tensors")
MODULE_ATTRIBUTES = ("fp8_meta", "_fp8_workspaces")
REDUCTION = "reduce_and_update_fp8_tensors"

ALLOW_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Transformer Engine from 2.16.1 on loads the scales of a checkpoint, which it unpickles, only where this variable is 1."""


def _keeps_16_bit_main_parameters(args: argparse.Namespace) -> bool:
    return bool(args.use_precision_aware_optimizer) and args.main_params_dtype not in ("fp32", torch.float32)


IN_FP8 = (
    Refusal(
        "--fp8-recipe {0.fp8_recipe}",
        "its quantizers may keep state that is not known",
        f"use {', '.join(AVAILABILITY)}",
        lambda args: args.fp8_recipe not in AVAILABILITY,
    ),
    Refusal("--use-transformer-engine-op-fuser", "fused operations keep their scales elsewhere"),
    Refusal(
        "--reuse-grad-buf-for-mxfp8-param-ag with --overlap-param-gather",
        "parameters wait in the gradient buffers, which reference passes need",
        "leave one of them out",
        lambda args: args.reuse_grad_buf_for_mxfp8_param_ag and args.overlap_param_gather,
    ),
    Refusal(
        "--main-params-dtype and --fp8-param-gather with --fp8-recipe {0.fp8_recipe}",
        "there is no shard of the parameters that the projection could be laid out by",
        "leave --main-params-dtype out",
        lambda args: args.fp8_param_gather and args.fp8_recipe != "delayed" and _keeps_16_bit_main_parameters(args),
    ),
    Refusal(
        "--fp8-param-gather with --fp8-recipe mxfp8",
        "Transformer Engine cannot put MXFP8 parameters into Megatron's buffers",
        "add --reuse-grad-buf-for-mxfp8-param-ag without --overlap-param-gather, or leave --fp8-param-gather out",
        lambda args: (
            args.fp8_param_gather and args.fp8_recipe == "mxfp8" and not args.reuse_grad_buf_for_mxfp8_param_ag
        ),
    ),
)
"""Whose state reference passes could not put back."""


def check_fp8_flags(args: argparse.Namespace) -> None:
    """Refuse, by the flag's name, FP8 whose state reference passes could not put back. Needs no GPU.

    Raises:
        UnsupportedError: a recipe, or a combination with other flags.
        UserError: micro-batches that Transformer Engine cannot quantise.
    """
    if not args.fp8:
        return
    refuse(IN_FP8, args, " in FP8 with --ogpsa-reference is not supported")
    _check_tokens(args)


def _check_tokens(args: argparse.Namespace) -> None:
    if args.seq_length is None:  # it comes with --use-checkpoint-args, and this is asked again
        return
    from megatron.core.fp8_utils import get_fp8_align_size

    ranks = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    tokens, multiple = args.seq_length * args.micro_batch_size // ranks, get_fp8_align_size(args.fp8_recipe)
    if tokens % multiple:
        raise UserError(
            f"--seq-length {args.seq_length} with --micro-batch-size {args.micro_batch_size} gives a rank {tokens} tokens: "
            f"--fp8-recipe {args.fp8_recipe} takes multiples of {multiple}; use a --seq-length that gives one"
        )


def check_fp8_available(args: argparse.Namespace) -> None:
    """Refuse a recipe that this GPU, or this Transformer Engine, does not have.

    Raises:
        UserError: Transformer Engine is missing, or the GPU cannot.
        UnsupportedError: a Transformer Engine whose FP8 state is kept otherwise than in the one this was written for.
    """
    if not args.fp8 or args.fp8_recipe not in AVAILABILITY:
        return
    manager, module = _transformer_engine()
    wanted = (REDUCTION, AVAILABILITY[args.fp8_recipe])
    missing = [f"FP8GlobalStateManager.{name}" for name in wanted if not hasattr(manager, name)]
    missing += [f"TransformerEngineBaseModule.{name}" for name in MODULE_METHODS if not hasattr(module, name)]
    if missing:
        raise UnsupportedError(_other_version(missing[0]))
    _check_scales_can_be_loaded(args)
    if (reason := reason_against(args.fp8_recipe, manager)) is None:
        return
    others = [recipe for recipe in AVAILABILITY if reason_against(recipe, manager) is None]
    raise UserError(
        f"--fp8-recipe {args.fp8_recipe}: this GPU cannot ({reason}); "
        + (f"use --fp8-recipe {' or '.join(others)}" if others else "leave --fp8-format out and train in --bf16")
    )


def _check_scales_can_be_loaded(args: argparse.Namespace) -> None:
    loaded = [f"--load {args.load}"] if args.load else []
    loaded += [f"--pretrained-checkpoint {args.pretrained_checkpoint}"] if args.pretrained_checkpoint else []
    if args.fp8_recipe != "delayed" or not (loaded or args.save) or os.environ.get(ALLOW_PICKLES) == "1":
        return
    try:
        import_module("transformer_engine.pytorch._extra_state")
    except ImportError:  # an older one, which asks for no such thing
        return
    # The recipe that a checkpoint was saved with decides: one of delayed scaling loads under no other recipe either.
    given, other = (
        (loaded[0], "") if loaded else (f"--save {args.save}", ", or use --fp8-recipe tensorwise, which keeps none")
    )
    raise UserError(
        f"--fp8-recipe delayed with {given}: its scales are pickled into checkpoints, and this Transformer Engine does not "
        f"load them unless {ALLOW_PICKLES}=1 is set: set it if you trust those who write there{other}"
    )


def rounding_told(args: argparse.Namespace) -> str:
    """What ``--fp8-param-gather`` rounds beside the computation; empty without it.

    Megatron stores the model's weights in checkpoints, not the optimizer's fp32 main parameters in their place
    (``core/dist_checkpointing/strategies/filesystem_async.py``).
    """
    if not args.fp8_param_gather:
        return ""
    return (
        "--fp8-param-gather: what the next stage, evaluate and convert read of checkpoints are weights rounded to FP8, in "
        "which small learning rates may not show: leave it out to keep them"
    )


def reason_against(recipe: str, manager: Any) -> str | None:
    """Why the GPU cannot run ``recipe``, in Transformer Engine's words; None if it can."""
    can, reason = getattr(manager, AVAILABILITY[recipe])()
    return None if can else str(reason).rstrip(".")


def check_fp8_modules(modules: Sequence[Any]) -> None:
    """Refuse Transformer Engine modules that lack what is to be put back after each reference pass.

    Raises:
        UnsupportedError: names the attribute.
    """
    for module in modules:
        for name in MODULE_ATTRIBUTES:
            if not hasattr(module, name):
                raise UnsupportedError(_other_version(f"{type(module).__name__}.{name}"))


def _transformer_engine() -> tuple[Any, Any]:
    try:
        from megatron.core.fp8_utils import FP8GlobalStateManager
        from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    except ImportError as error:
        raise UserError(
            f"--fp8-format needs Transformer Engine, which cannot be imported ({error}): "
            "pip install 'transformer-engine[core_cu13,pytorch]', or train in --bf16"
        ) from None
    return FP8GlobalStateManager, TransformerEngineBaseModule


def _other_version(name: str) -> str:
    return (
        f"--fp8-format: this Transformer Engine has no {name}, which the recipe or putting back its scales needs: "
        "use a newer version (blockwise needs 2.3, all others 2.0), or train in --bf16"
    )
