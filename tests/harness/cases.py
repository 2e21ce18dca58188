"""Jobs for the tests of the harness itself; each runs on every rank."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist


def rank_and_sum(values: list[float]) -> dict[str, Any]:
    """This rank, its process, and the sum over all ranks of ``values[rank]``."""
    total = torch.tensor(values[dist.get_rank()], dtype=torch.float64)
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "pid": os.getpid(), "total": total, "bf16": total.bfloat16().view(1)}


def fail_on(rank: int, message: str) -> None:
    """Raise on one rank while the others wait for it in a collective."""
    if dist.get_rank() == rank:
        raise ValueError(message)
    dist.all_reduce(torch.zeros(1))


def fail_everywhere() -> None:
    """The same error on each rank."""
    raise ValueError("alike everywhere")


def hang_on(rank: int) -> None:
    """One rank never comes to the collective."""
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))


def crash_on(rank: int) -> None:
    """One rank dies without a word from Python, after a line on stdout."""
    print("about to be killed", flush=True)
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


def leave_child_running() -> int:
    """A child that outlives the job; its process id."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def return_object() -> object:
    """A result that only pickle could carry."""
    return object()


def destroy_default_group() -> None:
    """What a job must not do."""
    dist.destroy_process_group()


def initialize_megatron_and_litter(tensor_axis: int) -> dict[str, Any]:
    """Set up Megatron's globals, use them, and leave everything lying about."""
    from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    found = {
        "initialized": parallel_state.model_parallel_is_initialized(),
        "generators": sorted(tensor_parallel.get_cuda_rng_tracker().get_states()),
        "calculator": num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None,
        "environment": os.environ.get("LITTER"),
        "argv": list(sys.argv),
        "draws": [torch.rand(()).item(), random.random()],
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "dtype": str(torch.get_default_dtype()),
    }
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_axis)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    num_microbatches_calculator.init_num_microbatches_calculator(dist.get_rank(), None, 4, 1, 1)
    ones = torch.ones(1)
    dist.all_reduce(ones, group=parallel_state.get_tensor_model_parallel_group())
    RotaryEmbedding(8, 1.0, use_cpu_initialization=True, cp_group=parallel_state.get_context_parallel_group())(4)
    os.environ["LITTER"] = "left"
    sys.argv.append("--litter")
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    return found | {"tensor_axis": int(ones)}
