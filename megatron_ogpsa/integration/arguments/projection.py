"""What flags ask of the projection: its settings, defaults that follow from other flags, and what is refused at start."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ogpsa.config import MAX_CONFLICT_REFERENCES, OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.integration.arguments.packing import check_packing
from megatron_ogpsa.integration.projection.authors import check_authors_arguments
from megatron_ogpsa.integration.projection.reference_data import loss_of_reference
from megatron_ogpsa.integration.projection.schedule import check_schedule_arguments
from megatron_ogpsa.precision.fp8_support import check_fp8_flags

DEFAULT_REFRESH_INTERVAL = {"sft": 30, "dpo": 5}
"""Optimizer steps between refreshes (arXiv:2602.07892)."""


@dataclass(frozen=True)
class Refusal:
    """A flag that does not go with references, why, and the nearest thing that works."""

    flag: str
    reason: str
    remedy: str


def config_from_arguments(args: argparse.Namespace) -> OGPSAConfig:
    """The projection's settings from ``--ogpsa-*`` flags.

    Raises:
        UserError: a value that the projection refuses.
    """
    return OGPSAConfig(
        granularity=args.ogpsa_granularity,
        mode=args.ogpsa_mode,
        space=args.ogpsa_space,
        energy=args.ogpsa_energy,
        refresh_interval=args.ogpsa_refresh_interval,
        basis_dtype=args.ogpsa_basis_dtype,
        basis_device=args.ogpsa_basis_device,
    )


def check_projection_arguments(args: argparse.Namespace) -> None:
    """Fill in what was left out, and refuse by the flag's name what projection in Megatron's loop does not support.

    Raises:
        UserError: references with the same name, or the script did not add our flags to Megatron's parser.
        UnsupportedError: a Megatron feature, with the nearest thing that works.
    """
    if not hasattr(args, "ogpsa_reference"):
        raise UserError(
            "the --ogpsa-* flags are unknown to this script: give Megatron's parser "
            "extra_args_provider=megatron_ogpsa.add_ogpsa_arguments"
        )
    if not args.ogpsa_reference:
        return
    _fill_in_defaults(args)
    _check_references(args)
    check_authors_arguments(args)
    check_schedule_arguments(args)
    config_from_arguments(args)
    _check_number_of_gradients(args)
    for refusal in _refusals(args):
        raise UnsupportedError(
            f"{refusal.flag} with --ogpsa-reference is not supported: {refusal.reason}; {refusal.remedy}"
        )
    _check_rows_of_references(args)
    check_fp8_flags(args)


def _fill_in_defaults(args: argparse.Namespace) -> None:
    """Those that are the paper's by stage, and the authors' where their rule was asked for."""
    is_the_authors = args.ogpsa_authors_rule or args.ogpsa_authors_leak
    if args.ogpsa_refresh_interval is None:
        args.ogpsa_refresh_interval = DEFAULT_REFRESH_INTERVAL[args.ogpsa_stage]
    if args.ogpsa_space is None:
        args.ogpsa_space = "gradient" if is_the_authors else "update"
    if args.ogpsa_mode is None:
        args.ogpsa_mode = "orthogonal" if is_the_authors else "conflict"


def _check_references(args: argparse.Namespace) -> None:
    names = _names(args)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--ogpsa-reference {repeated[0]}=… is given twice: give each reference a name of its own")
    if unknown := sorted({name for name, _ in args.ogpsa_reference_loss if name is not None} - set(names)):
        raise UserError(f"--ogpsa-reference-loss {unknown[0]}=…: no --ogpsa-reference has this name")
    if args.ogpsa_references_in_bf16 and not args.bf16:
        raise UserError(
            "--ogpsa-references-in-bf16: reference passes without FP8 are in the parameters' type, which is bf16 with "
            "--bf16 only; add it, or leave --ogpsa-references-in-bf16 out"
        )
    if args.ogpsa_references_in_bf16 and args.fp8 and args.tp_comm_overlap:
        raise UnsupportedError(
            "--tp-comm-overlap with --ogpsa-references-in-bf16 and --fp8-format: its buffers are made for products in FP8 "
            "alone; leave one of them out"
        )


def _check_rows_of_references(args: argparse.Namespace) -> None:
    """Pairs stand in one row, whatever training's rows hold; conversations do with ``--ogpsa-packing``."""
    of_pairs = [loss for name in _names(args) if (loss := loss_of_reference(args, name)) != "nll"]
    if args.ogpsa_packing or of_pairs:
        flag = "--ogpsa-packing" if args.ogpsa_packing else f"--ogpsa-reference-loss {of_pairs[0]}"
        check_packing(args, flag, of_validation=args.ogpsa_packing)


def _check_number_of_gradients(args: argparse.Namespace) -> None:
    gradients = len(args.ogpsa_reference) * args.ogpsa_rank_per_reference
    if args.ogpsa_mode == "conflict" and gradients > MAX_CONFLICT_REFERENCES:
        raise UnsupportedError(
            f"--ogpsa-mode conflict with {gradients} reference gradients: it solves for up to {MAX_CONFLICT_REFERENCES}; "
            "join some references into one, lower --ogpsa-rank-per-reference, or use --ogpsa-mode orthogonal"
        )


def _refusals(args: argparse.Namespace) -> Iterator[Refusal]:
    """What is given and does not go with references."""
    if args.fp4:
        reason = "reference passes would leave their mark on its scaling factors"
        yield Refusal("--fp4-format", reason, "train in --bf16 or with --fp8-format")
    if args.te_precision_config_file:
        reason = "which layers are quantised, and by what, would not be known"
        yield Refusal("--te-precision-config-file", reason, "use --fp8-format")
    if args.context_parallel_size > 1 and any(loss_of_reference(args, name) != "nll" for name in _names(args)):
        reason = "it would cut a reference's answers"
        yield Refusal("--context-parallel-size", reason, "protect the loss nll, or use 1")
    if args.multi_latent_attention and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        reason = "without sequence parallelism copies of the keys' projection drift apart, each with one rank's heads"
        yield Refusal("--multi-latent-attention", reason, "add --sequence-parallel")
    for flag, is_given in (
        ("--use-megatron-fsdp", args.use_megatron_fsdp),
        ("--use-torch-fsdp2", args.use_torch_fsdp2),
    ):
        if is_given:
            reason = "its gradients lie outside Megatron's gradient buffers"
            yield Refusal(flag, reason, "use --use-distributed-optimizer")
    if args.optimizer not in ("adam", "sgd"):
        yield Refusal(f"--optimizer {args.optimizer}", "its shards differ", "use adam")
    if args.ogpsa_space == "update":
        for flag, is_given in (
            ("--optimizer-cpu-offload", args.optimizer_cpu_offload),
            ("--use-precision-aware-optimizer", args.use_precision_aware_optimizer),
        ):
            if is_given:
                reason = "--ogpsa-space update does not reach parameters within the inner optimizer"
                yield Refusal(flag, reason, "use --ogpsa-space gradient")
        if args.qk_clip:
            reason = "it changes weights after the step, where --ogpsa-space update projects nothing"
            yield Refusal("--qk-clip", reason, "use --ogpsa-space gradient")
    for flag, is_given, reason in (
        ("--mtp-num-layers", args.mtp_num_layers, "losses of references would enter those that the log shows"),
        ("--cuda-graph-impl", args.cuda_graph_impl != "none", "graphs replay training passes only"),
        ("--optimizer-cuda-graph", args.optimizer_cuda_graph, "the projection decides on the host"),
        ("--perform-rl-step", args.perform_rl_step, "references have no rollouts"),
        ("--moe-single-grouped-weight", args.moe_single_grouped_weight, "blocks would hold several experts"),
        ("--moe-paged-stash", args.moe_paged_stash, "its buffers would be sized for reference passes"),
        ("--hybrid-context-parallel", args.hybrid_context_parallel, "its schedule reads Megatron's own packed data"),
        (
            "--fine-grained-activation-offloading",
            args.fine_grained_activation_offloading,
            "it is set up for the micro-batches of the first pass, which would be a reference's",
        ),
        (
            "--overlap-moe-expert-parallel-comm",
            args.overlap_moe_expert_parallel_comm,
            "it schedules micro-batches layer by layer, which reference passes are not",
        ),
    ):
        if is_given:
            yield Refusal(flag, reason, "leave it out")


def _names(args: argparse.Namespace) -> list[str]:
    return [name for name, _ in args.ogpsa_reference]
