"""The entry point: Megatron's ``pretrain`` with what this project adds around it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.cpu import check_supported_on_cpu
from megatron_ogpsa.integration.arguments.loop import check_places
from megatron_ogpsa.integration.checkpoints.disk import check_folders, install_disk_errors
from megatron_ogpsa.integration.checkpoints.loading import guard_checkpoints
from megatron_ogpsa.integration.loop.hang_watch import pulsing, watched
from megatron_ogpsa.integration.loop.hooks import LoopHook, install_hooks
from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu, install_in_training_loop
from megatron_ogpsa.integration.runtime.patching import apply_patches
from megatron_ogpsa.integration.runtime.wheel import GPU_PATCHES, WHEEL_PATCHES
from megatron_ogpsa.precision.fp8_support import check_fp8_available
from megatron_ogpsa.system.megatron import require_supported_megatron
from megatron_ogpsa.system.open_files import raise_limit
from megatron_ogpsa.system.processes import require_common_count

_PRETRAIN_PARAMETERS = (
    "cfg_container",
    "train_valid_test_dataset_provider",
    "model_type",
    "forward_step_func",
    "model_provider",
)


def pretrain(
    cfg_container: Any,
    train_valid_test_dataset_provider: Callable[..., Any],
    model_type: Any,
    forward_step_func: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Megatron's training program, with gradient projection when ``--ogpsa-reference`` was given.

    Takes what ``megatron.training.pretrain`` of 0.19 takes and does what it does. Without a GPU it runs on gloo.

    Raises:
        UserError: this Megatron is not supported, or a flag needs a GPU and there is none.
    """
    prepare_megatron()  # before anything of Megatron is imported here

    from megatron.training import get_args

    from megatron_ogpsa.integration.stages import projection_hooks

    if hooks := projection_hooks(get_args()):
        given = (cfg_container, train_valid_test_dataset_provider, model_type, pulsing(forward_step_func), *args)
        return run_loop(hooks, *given, **kwargs)
    given = (cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func, *args)
    return _megatrons_pretrain(*given, **kwargs)


def run_loop(hooks: Sequence[LoopHook], *args: Any, **kwargs: Any) -> Any:
    """Megatron's ``pretrain`` with ``hooks`` in its loop.

    Checkpoints are verified before they are loaded, and hangs are watched for.

    Raises:
        UserError: a flag needs a GPU and there is none, a folder cannot be written, the watch's timeout cannot be, or
            torchrun would start ranks again that do not find each other.
    """
    from megatron.training import get_args

    require_common_count()
    raise_limit()
    known = get_args()
    check_places(known)
    check_folders(save=known.save, tensorboard_dir=known.tensorboard_dir)
    install_hooks(hooks)
    guard_checkpoints()
    install_disk_errors()
    with watched(known):
        return _megatrons_pretrain(*args, **kwargs)


def _megatrons_pretrain(*args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args
    from megatron.training.training import pretrain as megatron_pretrain

    check_device(get_args())
    return megatron_pretrain(*args, **kwargs)


def check_device(args: argparse.Namespace) -> None:
    """Refuse what this machine, or its Transformer Engine, does not have.

    Raises:
        UserError: names the flag.
    """
    if install_if_no_gpu():
        check_supported_on_cpu(args)
    else:
        check_fp8_available(args)


def prepare_megatron() -> None:
    """Check that this Megatron is one we know, and patch what it needs to run from its wheel. Idempotent.

    Raises:
        UserError: another Megatron, named with the one that is wanted.
    """
    require_supported_megatron()
    install_if_no_gpu()

    from megatron.training.training import pretrain as megatron_pretrain

    found = tuple(inspect.signature(megatron_pretrain).parameters)[: len(_PRETRAIN_PARAMETERS)]
    if found != _PRETRAIN_PARAMETERS:
        raise UserError(f"this megatron.training.pretrain takes {found}, not Megatron 0.19's arguments: reinstall it")
    apply_patches(WHEEL_PATCHES)
    if not install_if_no_gpu():
        apply_patches(GPU_PATCHES)
    install_in_training_loop()
