"""What a run needs of the machine beside its GPUs: communication, memory, threads, variables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_ogpsa.doctor.findings import Finding, fail, ok, size_in_words, warn
from megatron_ogpsa.system.open_files import files_of_store_holder

RANK_BYTES = 1 << 30
"""Host memory of a rank that has imported torch and Megatron, before any model: 0.74 GB measured, and room to work."""

SHARED_BYTES = 1 << 30
"""Room in /dev/shm below which data loaders' workers and NCCL run out of it. Docker's default is 64 MB."""

BLACKWELL = 10
"""Major compute capability from which Megatron does without CUDA_DEVICE_MAX_CONNECTIONS=1 (training/arguments.py)."""

_CGROUP = Path("/sys/fs/cgroup")


def check_communication(*, has_gpu: bool) -> Finding:
    """Whether torch was built with the backend that ranks talk through: NCCL between GPUs, gloo otherwise."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return fail("communication", "torch is built without torch.distributed", "install an official build of torch")
    if not dist.is_gloo_available():
        return fail("communication", "torch is built without gloo", "install an official build of torch")
    if not has_gpu:
        return ok("communication", "gloo")
    if not dist.is_nccl_available():
        return fail("communication", "torch is built without NCCL", "install an official CUDA build of torch")
    return ok("communication", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, gloo")


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes of host memory that new processes can have; a container's limit counts."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:  # cgroups of version 1, or none
        return available
    if limit == "max":
        return available
    needed = int(used) - int(statistics.get("inactive_file", 0))  # files that were read are given up for it
    return min(available, max(int(limit) - needed, 0))


def check_memory(available: int, *, ranks: int) -> Finding:
    """Free host memory against what the ranks of this machine take before any model.

    Args:
        available: bytes, of :func:`available_memory`.
        ranks: on this machine.
    """
    wanted = ranks * RANK_BYTES
    if available < wanted:
        what = f"{ranks} rank{'s' * (ranks > 1)} take about {size_in_words(wanted)} before any model"
        text = f"{size_in_words(available)} free, and {what}"
        return warn("host memory", text, "free memory, or start fewer ranks here")
    return ok("host memory", f"{size_in_words(available)} free")


def check_gpu_memory(total: int, needed: int) -> Finding:
    """A GPU's memory against what a rank keeps there.

    Args:
        total: bytes of the smallest GPU.
        needed: bytes of weights, gradients, optimizer state and basis of one rank; activations come on top.
    """
    what = "weights, gradients, optimizer and basis of a rank, without activations,"
    text = f"{what} take {size_in_words(needed)} of a GPU's {size_in_words(total)}"
    remedy = "use more GPUs, more tensor or pipeline parallelism, --ogpsa-basis-device cpu, or a smaller model"
    return fail("GPU memory", text, remedy) if needed > total else ok("GPU memory", text)


def check_model_memory(available: int, needed: int) -> Finding:
    """Free host memory against a model that is trained in it.

    Args:
        needed: bytes of weights, gradients, optimizer state and basis of all ranks.
    """
    what = "weights, gradients, optimizer and basis of all ranks"
    text = f"{what} take {size_in_words(needed)} of {size_in_words(available)} free"
    if needed > available:
        return fail("model memory", text, "use a machine with GPUs or more memory, more nodes, or a smaller model")
    return ok("model memory", text)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Room in /dev/shm, through which processes of one machine pass data."""
    name = str(folder)
    if not folder.is_dir():
        return warn(name, "is not there: data loaders' workers and NCCL need it", "mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    if free < SHARED_BYTES:
        remedy = "in a container: docker run --shm-size 16g, or --ipc=host; otherwise delete what lies there"
        return warn(name, f"{size_in_words(free)} free: data loaders' workers and NCCL run out of it", remedy)
    return ok(name, f"{size_in_words(free)} free")


def check_open_files(limits: tuple[int, int], *, num_ranks: int | None, by_torchrun: bool) -> Finding:
    """The limit of open files against the connections of whoever holds the job's store, on the first node.

    Args:
        limits: what processes are started with, and up to which they may raise it; megatron-ogpsa's do.
        num_ranks: of the whole run; None where nobody has said it.
        by_torchrun: torchrun has started this process; it may hold the store itself, and raises nothing.
    """
    name, (soft, hard) = "open files", limits
    if num_ranks is None:
        return ok(name, f"{soft}, raised to {hard}")
    needed = files_of_store_holder(num_ranks)
    text = f"{num_ranks} ranks take about {needed} in the process that holds their store"
    if hard < needed:
        remedy = f"allow {needed} on the first node: ulimit -Hn; in a container docker run --ulimit nofile={needed}"
        return (fail if hard < needed // 2 else warn)(name, f"at most {hard}, and {text}", remedy)
    if by_torchrun and soft < needed:
        remedy = f"ulimit -n {hard} before torchrun on the first node, which may hold the store and raises no limit"
        return warn(name, f"{soft}, and {text}", remedy)
    return ok(name, f"{soft}, raised to {hard}; {text}")


def check_threads(*, ranks: int, environment: Mapping[str, str] = os.environ, cores: int | None = None) -> Finding:
    """OMP_NUM_THREADS against the cores; without it torchrun says 1, and megatron-ogpsa shares the cores out."""
    name, cores = "OMP_NUM_THREADS", cores or len(os.sched_getaffinity(0))
    given = environment.get(name)
    if given is None:
        return ok(name, f"unset: {cores} cores are shared among {ranks} rank{'s' * (ranks > 1)}; torchrun would set 1")
    if not given.isdigit() or int(given) < 1:
        return fail(name, f"{given!r} is not a number of threads", f"export {name}={max(1, cores // ranks)}")
    if int(given) * ranks > max(cores, ranks):
        text = f"{given} for each of {ranks} ranks: {int(given) * ranks} threads for {cores} cores"
        return warn(name, text, f"export {name}={max(1, cores // ranks)}")
    return ok(name, f"{given} for each of {ranks} rank{'s' * (ranks > 1)} on {cores} cores")


def check_connections(
    generation: int | None, *, tensor: int, context: int, environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """CUDA_DEVICE_MAX_CONNECTIONS, which orders communication before computation on GPUs before Blackwell.

    Args:
        generation: major compute capability; None without a GPU, of which nothing is said.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if generation is None:
        return []
    given = environment.get(name)
    if generation >= BLACKWELL or (tensor == 1 and context == 1) or given == "1":
        return [ok("connections", f"{name} is {given or 'unset'}, as this GPU and layout want it")]
    if given is None:
        return [
            ok("connections", f"{name} is unset: megatron-ogpsa sets it to 1 for its ranks, as this layout wants it")
        ]
    text = f"{name} is {given or 'unset'}: tensor and context parallelism need 1 on this GPU"
    return [fail("connections", text, f"export {name}=1")]


def check_determinism(environment: Mapping[str, str] = os.environ) -> Finding:
    """What ``--deterministic-mode`` needs of the environment, by Megatron's own rules (training/determinism.py).

    The libraries read these variables once: here Megatron sets them as it validates the flags, before there is a model.
    """
    from megatron.training.determinism import DETERMINISM_ENV_VAR_DEFAULTS, apply_determinism_env

    chosen = dict(environment)
    try:
        apply_determinism_env(chosen)
    except AssertionError as error:
        names = ", ".join(name for name in DETERMINISM_ENV_VAR_DEFAULTS if name in environment)
        return fail("determinism", str(error), f"unset {names}: Megatron sets what is needed")
    shown = ", ".join(f"{name}={chosen[name]}" for name in DETERMINISM_ENV_VAR_DEFAULTS)
    return ok("determinism", f"set when the flags are validated, before the model is built: {shown}")
