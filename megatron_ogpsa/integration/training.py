"""The entry point: Megatron's ``pretrain`` with what this project adds around it."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.cpu_arguments import check_supported_on_cpu
from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu, install_in_training_loop
from megatron_ogpsa.integration.patching import Patch, apply_patches, require_supported_megatron
from megatron_ogpsa.integration.projection import install as install_projection

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
    from megatron.training import get_args

    prepare_megatron()
    if install_if_no_gpu():
        check_supported_on_cpu(get_args())

    from megatron.training.training import pretrain as megatron_pretrain

    install_projection(get_args())
    return megatron_pretrain(
        cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func, *args, **kwargs
    )


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
    apply_patches(_WHEEL_PATCHES)
    install_in_training_loop()


def _compiled_helpers_only_if_missing(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


_WHEEL_PATCHES = (
    Patch(
        target="megatron.core.datasets.utils:compile_helpers",
        reason="the wheel ships the compiled index builder and no Makefile, so that compiling it would end the run",
        replace=_compiled_helpers_only_if_missing,
    ),
)
