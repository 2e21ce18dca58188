"""A fine-tuning run from its list of flags: what each rank executes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch.distributed as dist

from megatron_ogpsa.checkpoints.survey import checkpoint_folder, survey
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.validation import validated_arguments
from megatron_ogpsa.integration.stages import build_stage
from megatron_ogpsa.integration.training import prepare_megatron, run_loop
from megatron_ogpsa.precision.fp8_support import rounding_told

logger = logging.getLogger(__name__)


def run_training(flags: list[str]) -> None:
    """The stage of ``--ogpsa-stage`` through Megatron's training loop; returns when training has ended.

    Args:
        flags: Megatron's flags and ours, as on a command line.

    Raises:
        UserError: a mistake in flags or data, on every rank alike; or what this rank alone has met, and told already.
    """
    prepare_megatron()
    args = validated_arguments(flags, for_training=True)
    if os.environ.get("RANK", "0") == "0":
        for told in ("" if args.save else "no --save: nothing will be kept of this run", rounding_told(args)):
            if told:
                logger.warning(told)
    stage = build_stage(args)

    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    ends_alike = True
    try:
        run_loop(stage.hooks, config, stage.datasets_provider, ModelType.encoder_or_decoder, stage.forward_step)
        if args.train_iters and args.iteration >= args.train_iters and dist.get_rank() == 0:
            print(f"nothing was left to train: --load {args.load} is at step {args.iteration} of {args.train_iters}")
    except SystemExit as end:
        # --exit-interval, --exit-duration-in-mins or a signal: if that was in the last step, and this is saved, the run has
        # ended, and what follows it may begin.
        if end.code or not args.save or not _is_saved(Path(args.save), args.train_iters):
            raise
    except UserError as error:
        # Without NCCL the others wait for nothing but this rank's connections, and learn from their end.
        ends_alike = error.is_alike or args.distributed_backend != "nccl"
        raise
    except Exception:  # of this rank alone: it must not wait for the others before it has told why
        ends_alike = False
        raise
    finally:
        if ends_alike and dist.is_initialized():
            dist.destroy_process_group()


def _is_saved(folder: Path, last_step: int) -> bool:
    """Whether that is what the tracker names: Megatron does without where it has saved a non-persistent checkpoint."""
    return survey(folder).tracked == checkpoint_folder(folder, last_step).name
