"""A Megatron model for scoring: the weights of a checkpoint in any layout, without optimizer and gradient buffers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ogpsa.checkpoints import examine
from megatron_ogpsa.checkpoints.survey import TRACKER_FILE, survey
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.loop import check_model
from megatron_ogpsa.integration.arguments.validation import validated_arguments
from megatron_ogpsa.integration.checkpoints.loading import guard_checkpoints
from megatron_ogpsa.integration.checkpoints.saved_arguments import Difference, noted_arguments
from megatron_ogpsa.integration.ranks.agreement import agreed, from_rank_0
from megatron_ogpsa.integration.training import check_device, prepare_megatron
from megatron_ogpsa.precision.fp8_state import has_forward_scales, starts_without_scales
from megatron_ogpsa.refusal import Refusal, refuse

IN_SCORING = (
    Refusal(
        "--context-parallel-size {0.context_parallel_size}",
        "a checkpoint loads in any layout",
        "leave it out, or use --tensor-model-parallel-size",
        lambda args: args.context_parallel_size > 1,
    ),
    Refusal("--mtp-num-layers {0.mtp_num_layers}", "", applies=lambda args: args.mtp_num_layers),
)


@dataclass(frozen=True)
class Loaded:
    """What a model has taken its weights from.

    Attributes:
        iteration: 0 of a release.
        differences: flags of the model with another value than in the run that has saved it.
    """

    iteration: int
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, whose weights can be exchanged for those of one checkpoint after another.

    Attributes:
        args: Megatron's, validated.
        module: this rank's part; the layout has one model chunk on each pipeline stage.
    """

    args: argparse.Namespace
    module: Any

    @classmethod
    def build(cls, flags: list[str], *, check: Callable[[argparse.Namespace], None] = lambda args: None) -> LoadedModel:
        """Start Megatron and build the model; its weights are random until :meth:`load`. Collective.

        What orders training alone is left out, because weights are the same in any layout: interleaved stages, and
        sequence parallelism, for which Megatron generates one token at a time no faster and not at all with a cache.

        Args:
            flags: Megatron's flags and ours, as on a command line.
            check: what else is asked of them, before the time that a model takes; without communication.

        Raises:
            UserError: a mistake in the flags.
        """
        prepare_megatron()
        # After it has patched some of what is imported here.
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

        # From where the training loop has it: there the CPU runtime has told it that no GPU is needed.
        from megatron.training.training import initialize_megatron

        args = validated_arguments(flags)
        args.save = None  # the configuration's run may be another user's: data that is scored is not kept in its folder
        _refuse_unsupported(args)
        check_device(args)
        check(args)
        args.virtual_pipeline_model_parallel_size = None
        args.sequence_parallel = False
        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        initialize_megatron()
        guard_checkpoints()
        builder = container.model.get_builder_cls()(container.model)
        (module,) = builder.build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), ddp_config=container.ddp, wrap_with_ddp=False
        )
        return cls(args, module.eval())

    def load(self, folder: str, iteration: int | None = None, *, flag: str = "--load") -> Loaded:
        """Take the weights of a checkpoint, whatever layout has saved it; verified where it has a manifest. Collective.

        Args:
            folder: of checkpoints, of which the newest is taken.
            iteration: take this one.
            flag: what the user calls it.

        Raises:
            UserError: there is none, or it is damaged or of another model: never are random weights scored.
        """
        from megatron.training.training import load_checkpoint

        args = self.args
        from_rank_0(lambda: require_checkpoint(flag, folder, iteration))
        args.load, args.ckpt_step, args.pretrained_checkpoint = folder, iteration, None
        args.non_persistent_ckpt_type = None  # Megatron would prefer a newer one, whatever was asked for
        args.finetune = args.no_load_optim = args.no_load_rng = args.exit_on_missing_checkpoint = True
        with noted_arguments() as saved:
            load_checkpoint([self.module], None, None)
        self._require_scales(flag, folder)
        return Loaded(agreed(lambda: _loaded_iteration(folder, iteration)), saved.differences(args))

    def _require_scales(self, flag: str, folder: str) -> None:
        """With the scale 1, which a module begins with, small activations would be rounded to nothing and scores be wrong."""
        if not starts_without_scales([self.module]):
            return
        held = [False] * dist.get_world_size()
        dist.all_gather_object(held, has_forward_scales([self.module]))  # a stage may have no layers
        if not any(held):
            raise UserError(
                f"{flag} {folder}: it was not trained with --fp8-recipe {self.args.fp8_recipe} and holds no scales for it: "
                "leave --fp8-format out, or use --fp8-recipe tensorwise"
            )


def require_checkpoint(flag: str, folder: str, iteration: int | None) -> None:
    """Look whether what is asked for can be there, in a moment: its files are, whatever their contents. On one process.

    Raises:
        UserError: it is not; names the flag.
    """
    examined = examine(Path(folder), iteration, contents=False)
    if examined.is_tracked or (iteration is not None and examined.chosen is not None):
        return
    what = "; ".join(examined.problems[:3]) or "there is no checkpoint"
    there = [examined.chosen] if examined.chosen is not None else survey(Path(folder)).saved
    others = [str(saved.iteration) for saved in there if saved.iteration not in (0, iteration)]
    if not (examined.problems and others):
        raise UserError(f"{flag} {folder}: {what}: name a folder with {TRACKER_FILE} and the checkpoint that it names")
    how = "--ckpt-step" if flag == "--load" else f"{folder}@ITERATION"
    raise UserError(f"{flag} {folder}: {what}: restore it, or take iteration {' or '.join(others[:3])} with {how}")


def _loaded_iteration(folder: str, iteration: int | None) -> int:
    found = survey(Path(folder))
    by_name = {saved.name: saved.iteration for saved in found.saved}
    return iteration if iteration is not None else by_name.get(found.tracked or "", 0)


def _refuse_unsupported(args: argparse.Namespace) -> None:
    check_model(args)
    refuse(IN_SCORING, args, " is not supported in scoring")
