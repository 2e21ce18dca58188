"""Flags of Megatron's with which its loop would go wrong or fail late in a run of ours: refused at start."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from megatron_ogpsa.errors import UnsupportedError, UserError, one_line
from megatron_ogpsa.refusal import Refusal, refuse

_OF_THE_MODEL = "num_layers hidden_size num_attention_heads max_position_embeddings".split()
_WANTED_BESIDE_CHECKPOINT = {"micro_batch_size": "rows that a rank computes at once, such as 1"}
_WANTED = {"seq_length": "positions of a row, such as 2048"} | _WANTED_BESIDE_CHECKPOINT
_WANTED_IN_TRAINING = {"lr": "the highest learning rate, such as 1e-6"}

PLACES = ("save", "load", "pretrained_checkpoint", "non_persistent_global_ckpt_dir")
"""Of checkpoints, as arguments."""


_OTHER_SAMPLES = (
    "the data of a skipped step is drawn on one tensor-parallel rank alone, so that ranks would train on different "
    "samples"
)


def _keeps_state(args: argparse.Namespace) -> bool:
    return args.ogpsa_stage == "dpo" or args.ogpsa_adaptive_interval is not None or args.fp16


IN_THE_LOOP = (
    Refusal("--iterations-to-skip", _OTHER_SAMPLES),
    Refusal("--result-rejected-tracker-filename", _OTHER_SAMPLES),
    Refusal("--phase-transition-iterations", "each phase would begin the data again"),
    Refusal("--full-validation", "Megatron 0.19 fails in its first evaluation"),
    Refusal("--multiple-validation-sets", "it goes with --full-validation alone, which is not"),
    Refusal(
        "--sft",
        "Megatron's evaluation would take the mean of micro-batches, of those too that only fill up the last batch",
    ),
    Refusal(
        "--rampup-batch-size",
        "Megatron 0.19 reads it nowhere, and the batch would have its full size from the first step on",
    ),
    Refusal(
        "--step-batch-size-schedule",
        "how much data a run takes is counted at its start, by one size of the batch",
    ),
    Refusal("--log-straggler", "its detector times a forward step of Megatron's own"),
    Refusal("--inprocess-restart", "Megatron's scripts restart so, and this command by --max-restarts"),
    Refusal("--freeze-all-layers", "Megatron 0.19 reads it in scripts only, so that all would train"),
    Refusal("--check-for-spiky-loss", "Megatron's own losses look at it, which are not these"),
    Refusal(
        "--ddp-average-in-collective",
        "it goes without --calculate-per-token-loss alone, which answers need to weigh alike",
    ),
    Refusal("--perform-rl-step", "this command has no rollouts"),
    Refusal("--yaml-cfg", "flags stand in CONFIG.yaml, under their own names", "write them there"),
    Refusal(
        "--trust-remote-code",
        "code that comes with a tokenizer is never run",
        "use a folder whose tokenizer transformers knows by itself",
    ),
    Refusal(
        "--dataloader-type external",
        "the data is read by Megatron's own loaders",
        applies=lambda args: args.dataloader_type == "external",
    ),
    Refusal(
        "--dataloader-type cyclic with --ogpsa-valid-data",
        "Megatron would shuffle the samples of all evaluations among each other",
        applies=lambda args: args.dataloader_type == "cyclic" and args.ogpsa_valid_data is not None,
    ),
    Refusal("--hybrid-context-parallel", "it splits packed documents of Megatron's own data"),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        "micro-batches would be scheduled layer by layer, which the losses here are not",
    ),
    Refusal(
        "--non-persistent-ckpt-type local",
        "DPO's reference policy, adaptive intervals and fp16 go on from a state beside the weights, which local checkpoints "
        "have no place for",
        "use --non-persistent-ckpt-type global",
        lambda args: args.non_persistent_ckpt_type == "local" and _keeps_state(args),
    ),
    Refusal(
        "--cuda-graph-impl with rows of several documents",
        "their number differs from graph to graph",
        applies=lambda args: args.cuda_graph_impl != "none" and (args.ogpsa_packing or args.ogpsa_stage == "dpo"),
    ),
)
"""Accepted by Megatron, and wrong or late with our data, losses and stages."""


def check_before_validation(args: argparse.Namespace, *, is_here: bool = True) -> None:
    """Refuse what Megatron's validation would drop with a warning, or what fails when a first checkpoint is saved.

    Args:
        args: as they were parsed.
        is_here: whether the run is to be on this machine, whose libraries count then.

    Raises:
        UserError, UnsupportedError: naming the flag and the remedy.
    """
    check_places(args)
    if args.async_save and not args.use_persistent_ckpt_worker:
        raise UserError("--async-save without --use-persistent-ckpt-worker is dropped by Megatron: add it")
    if args.async_save and args.async_strategy == "nvrx" and is_here:
        _require_nvrx()
    if args.non_persistent_ckpt_type == "local" and args.dist_ckpt_optim_fully_reshardable:
        raise UserError(
            "--non-persistent-ckpt-type local saves the optimizer's state as it lies: leave "
            "--dist-ckpt-optim-fully-reshardable out, or use --non-persistent-ckpt-type global"
        )


def require_flags(args: argparse.Namespace, *, for_training: bool) -> None:
    """Ask for what Megatron cannot do without, which it would miss in an assertion, a TypeError or a ValueError.

    Raises:
        UserError: naming the flag.
    """
    if not args.use_checkpoint_args:
        for name in _OF_THE_MODEL:
            if getattr(args, name) is None:
                raise UserError(f"--{_flag(name)} is missing: give it, or 'model: FOLDER' of a converted model")
    wanted = (_WANTED if not args.use_checkpoint_args else _WANTED_BESIDE_CHECKPOINT) | (
        _WANTED_IN_TRAINING if for_training else {}
    )
    for name, meaning in wanted.items():
        if getattr(args, name) is None:
            raise UserError(f"--{_flag(name)} is missing: {meaning}")
    if for_training and args.train_samples is None and (args.train_iters is None or args.train_iters < 1):
        given = "is missing" if args.train_iters is None else str(args.train_iters)
        raise UserError(f"--train-iters {given}: give the number of optimizer steps")
    for name in ("save_interval", "eval_interval"):
        given = getattr(args, name)
        if given is not None and given < 1:
            raise UserError(f"--{_flag(name)} {given}: use 1 or more, or leave it out")
    if args.seed < 1:  # Megatron raises when its ranks have met
        raise UserError(f"--seed {args.seed}: use 1 or more")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def check_places(args: argparse.Namespace, names: Sequence[str] = PLACES) -> None:
    """Refuse places of checkpoints that are no folders of a file system.

    Args:
        names: of the arguments that are looked at.

    Raises:
        UnsupportedError: naming the flag.
    """
    for name in names:
        place = getattr(args, name, None)
        if isinstance(place, str) and "://" in place:
            raise UnsupportedError(
                f"--{name.replace('_', '-')} {place}: object stores (--enable-msc) are not supported, because checkpoints "
                "there could not be verified; name a folder of a file system"
            )


def _require_nvrx() -> None:
    from megatron.core.dist_checkpointing.strategies.nvrx import has_nvrx_async_support

    remedy = "use --async-strategy mcore, or install nvidia-resiliency-ext"
    try:
        if not has_nvrx_async_support():
            raise UserError(
                f"--async-save with --async-strategy nvrx, and nvidia-resiliency-ext is not there: {remedy}"
            )
    except AssertionError as error:
        raise UserError(f"--async-save with --async-strategy nvrx: {error}: {remedy}") from None


def check_loop_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go with our data and stages.

    Raises:
        UnsupportedError: naming the flag, why, and the remedy.
    """
    refuse(IN_THE_LOOP, args)
    check_model(args)


def check_model(args: argparse.Namespace) -> None:
    """Refuse models that Megatron's builder of GPT models would quietly take for others.

    Raises:
        UnsupportedError: a hybrid of attention and state-space layers.
        UserError: ``--spec`` names no layers: Megatron would log a line, and build its own.
    """
    if args.hybrid_layer_pattern:
        raise UnsupportedError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern}: this command builds GPT models, of which each layer has "
            "attention; call megatron_ogpsa.pretrain in a script that builds the hybrid, or attach() in a loop of your own"
        )
    if not args.spec:
        return
    given = " ".join(args.spec)
    module, name = args.spec if len(args.spec) == 2 else ("", "")
    try:
        found = hasattr(importlib.import_module(module), name) if module else False
    except Exception as error:  # it is the user's code
        raise UserError(
            f"--spec {given}: {one_line(error)}: name a module that can be imported, and layers in it"
        ) from None
    if not found:
        raise UserError(
            f"--spec {given}: no such layers: give a module and a name in it, as --spec my.layers layer_spec"
        )
