"""What keeps the jobs of one process apart: each starts with the same seeds, and what it leaves behind is undone."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

SEED = 20260207

_DESTRUCTORS = (
    ("megatron.core.parallel_state", "destroy_model_parallel"),
    ("megatron.core.num_microbatches_calculator", "destroy_num_microbatches_calculator"),
    ("megatron.core.rerun_state_machine", "destroy_rerun_state_machine"),
    ("megatron.training.global_vars", "destroy_global_vars"),
    ("transformer_engine.pytorch.quantization", "FP8GlobalStateManager.reset"),
)
"""Megatron's own, and what holds groups of FP8's; called where the job has imported the module."""

_CACHES = (
    ("megatron.core.models.common.embeddings.rotary_pos_embedding", "RotaryEmbedding.forward"),
    ("megatron.core.models.common.embeddings.yarn_rotary_pos_embedding", "YarnRotaryEmbedding.forward"),
    ("transformer_engine.pytorch.distributed", "get_distributed_world_size"),
)
"""What has an ``lru_cache``, which holds groups, or objects that hold them."""


@contextmanager
def fresh_state() -> Iterator[Callable[[], None]]:
    """Seed the generators; yield the function that undoes what a successful job has left behind on this rank.

    That function is collective: it begins with a barrier, so that no rank closes a process group in which another one
    still waits for data.
    """
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    environment, arguments, folder = dict(os.environ), list(sys.argv), os.getcwd()
    gc.freeze()  # what imports and earlier jobs keep is not looked at again after this one, which would take half a second

    def clean_up() -> None:
        if not dist.is_initialized():
            raise RuntimeError("the job destroyed the default process group, which belongs to the worker group")
        dist.barrier()
        os.chdir(folder)
        sys.argv[:] = arguments
        os.environ.clear()
        os.environ.update(environment)
        _reset_torch()
        _reset_megatron()
        _destroy_process_groups()

    yield clean_up


def _reset_torch() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


def _reset_megatron() -> None:
    for module_name, function_name in _DESTRUCTORS:
        module: Any = sys.modules.get(module_name)
        if module is not None:
            attrgetter(function_name)(module)()
    generators: Any = sys.modules.get("megatron.core.tensor_parallel.random")
    if generators is not None:
        generators.initialize_rng_tracker(force_reset=True)
    parallel_state: Any = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None:
        return
    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError("megatron.core.parallel_state is still initialized after destroy_model_parallel()")
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):  # it forgets those of optimizer instances
            setattr(parallel_state, name, None)


def _destroy_process_groups() -> None:
    """Close all groups but the default one; Megatron only forgets its groups, and each holds threads and sockets."""
    _release_models()
    gc.collect()  # models and optimizers of the job hold references to their groups
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _release_models() -> None:
    """Empty what is left of the job's DistributedDataParallel objects.

    Each is in a circle with the hooks of its parameters' autograd nodes, which runs through C++, where the garbage
    collector does not see it. It would keep the job's model, and with that its process groups: 60 threads for each job,
    some thousand after a hundred, and a machine that does nothing but switch between them.
    """
    for module_name, name in _CACHES:
        if (module := sys.modules.get(module_name)) is not None:
            attrgetter(name)(module).cache_clear()
    distributed: Any = sys.modules.get("megatron.core.distributed")
    if distributed is not None:
        for candidate in gc.get_objects():
            if isinstance(candidate, distributed.DistributedDataParallel):
                vars(candidate).clear()
