"""What flags ask of the projection: its settings, defaults that follow from other flags, and what is refused at start."""

from __future__ import annotations

import argparse

from megatron_ogpsa.config import MAX_CONFLICT_REFERENCES, OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.integration.arguments.packing import check_packing
from megatron_ogpsa.integration.projection.authors import check_authors_arguments
from megatron_ogpsa.integration.projection.reference_data import loss_of_reference
from megatron_ogpsa.integration.projection.schedule import check_schedule_arguments
from megatron_ogpsa.plugin.limits import MODELS, MODELS_OF_UPDATES, OPTIMIZERS, OPTIMIZERS_OF_UPDATES, WRAPPERS
from megatron_ogpsa.precision.fp8_support import check_fp8_flags
from megatron_ogpsa.references.limits import PASSES
from megatron_ogpsa.references.steps import PAPERS_INTERVAL
from megatron_ogpsa.refusal import Refusal, refuse

SCOPE = " with --ogpsa-reference is not supported"
_UNKNOWN = "which layers are quantised, and by what, would not be known"


def _names(args: argparse.Namespace) -> list[str]:
    return [name for name, _ in args.ogpsa_reference]


def _has_kitchen(args: argparse.Namespace) -> bool:
    """Its flags are there where its package is."""
    return any(getattr(args, name, None) is not None for name in ("kitchen_config_file", "kitchen_recipe_number"))


def _cuts_pairs(args: argparse.Namespace) -> bool:
    return args.context_parallel_size > 1 and any(loss_of_reference(args, name) != "nll" for name in _names(args))


FLAGS = (
    Refusal("--te-precision-config-file", _UNKNOWN, "use --fp8-format"),
    Refusal("--kitchen-config-file or --kitchen-recipe-number", _UNKNOWN, "use --fp8-format", _has_kitchen),
    Refusal(
        "--context-parallel-size", "it would cut a reference's answers", "protect the loss nll, or use 1", _cuts_pairs
    ),
    Refusal(
        "--context-parallel-size with --ogpsa-packing",
        "documents would be cut apart",
        "leave one of them out",
        lambda args: args.context_parallel_size > 1 and args.ogpsa_packing,
    ),
    Refusal("--perform-rl-step", "references have no rollouts"),
)
"""What Megatron's configurations do not tell."""


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
        early_refreshes=args.ogpsa_early_refreshes,
        refresh_warmup=args.ogpsa_refresh_warmup_iters,
        basis_dtype=args.ogpsa_basis_dtype,
        basis_device=args.ogpsa_basis_device,
        check_leak=args.ogpsa_check_leak,
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
    refuse((*FLAGS, *PASSES, *WRAPPERS, *MODELS, *OPTIMIZERS), args, SCOPE)
    if args.ogpsa_space == "update":
        refuse((*OPTIMIZERS_OF_UPDATES, *MODELS_OF_UPDATES), args, SCOPE)
    _check_rows_of_references(args)
    check_fp8_flags(args)


def _fill_in_defaults(args: argparse.Namespace) -> None:
    """Those that are the paper's by stage, and the authors' where their rule was asked for."""
    is_the_authors = args.ogpsa_authors_rule or args.ogpsa_authors_leak
    if args.ogpsa_refresh_interval is None:
        args.ogpsa_refresh_interval = PAPERS_INTERVAL[args.ogpsa_stage]
    if args.ogpsa_early_refreshes is None:
        args.ogpsa_early_refreshes = not (is_the_authors or args.ogpsa_adaptive_interval is not None)
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
