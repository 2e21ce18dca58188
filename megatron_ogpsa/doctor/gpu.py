"""The GPUs of this machine. Where there is none, nothing is said of what one could do."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.doctor.findings import Finding, fail, ok, size_in_words, warn

FP8_CAPABILITY = (8, 9)
"""The oldest generation (Ada) with FP8 matrix products."""

BUSY_SHARE = 0.1
"""Share of a GPU's memory that may be in use before it is told."""

_PYTHON_HEADERS = Path(sysconfig.get_paths()["include"], "Python.h")
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as torch sees it; memory in bytes."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int


def visible_gpus() -> list[Gpu]:
    """Those that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        found.append(Gpu(name=torch.cuda.get_device_name(index), capability=capability, free=free, total=total))
    return found


def built_in_gpus(devices: Path = _PCI_DEVICES) -> int:
    """NVIDIA GPUs on the PCI bus, whether a driver is loaded or not."""

    def read(device: Path, name: str) -> str:
        try:
            return (device / name).read_text().strip()
        except OSError:
            return ""

    folders = devices.iterdir() if devices.is_dir() else ()
    return sum(read(d, "vendor") == _NVIDIA and read(d, "class")[:6] in _DISPLAY_CLASSES for d in folders)


def check_gpus(
    gpus: Sequence[Gpu], *, built_in: int, cuda_build: str | None, environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """How many GPUs there are and whether they can be used; with some, whether they are free, able to do FP8, and whether
    kernels can be compiled for them.

    Args:
        gpus: of :func:`visible_gpus`.
        built_in: of :func:`built_in_gpus`.
        cuda_build: the CUDA release that torch was built for; None for a build without it.
    """
    if not gpus:
        return [_without_gpu(built_in, cuda_build, environment)]
    return [_which(gpus), _fp8(gpus), check_compiler(environment)]


def _without_gpu(built_in: int, cuda_build: str | None, environment: Mapping[str, str]) -> Finding:
    if not built_in:
        text = "none: Megatron runs on the CPU with gloo, for trials and tests"
        return warn("GPU", text, "nothing for a trial; for real training use a machine with NVIDIA GPUs")
    text = f"{built_in} in this machine, and torch can use none"
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if cuda_build is None:
        return fail("GPU", f"{text}: it is built without CUDA", "install a CUDA build of torch")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return warn("GPU", f"{text}: CUDA_VISIBLE_DEVICES={hidden!r} hides them", "unset CUDA_VISIBLE_DEVICES")
    return fail(
        "GPU",
        f"{text}, which is built for CUDA {cuda_build}",
        "see whether nvidia-smi works; the driver may be missing, too old for this CUDA, or not passed into the container",
    )


def _which(gpus: Sequence[Gpu]) -> Finding:
    kinds = Counter(f"{gpu.name} (compute capability {_shown(gpu)}, {size_in_words(gpu.total)})" for gpu in gpus)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if len(kinds) > 1:
        return warn("GPU", f"{text}: the slowest sets the pace", "choose equal ones with CUDA_VISIBLE_DEVICES")
    busy = [
        f"GPU {i} has {size_in_words(g.free)} free" for i, g in enumerate(gpus) if g.free < (1 - BUSY_SHARE) * g.total
    ]
    if busy:
        return warn(
            "GPU", f"{text}; {', '.join(busy)}", "end the processes that nvidia-smi lists, or choose other GPUs"
        )
    return ok("GPU", f"{text}, all free")


def _fp8(gpus: Sequence[Gpu]) -> Finding:
    worst = min(gpus, key=lambda gpu: gpu.capability)
    if worst.capability < FP8_CAPABILITY:
        wanted = ".".join(map(str, FP8_CAPABILITY))
        return ok("FP8", f"{worst.name} cannot: it has compute capability {_shown(worst)}, FP8 needs {wanted}")
    return ok("FP8", f"{worst.name} can (compute capability {_shown(worst)})")


def check_compiler(environment: Mapping[str, str], headers: Path = _PYTHON_HEADERS) -> Finding:
    """What Triton compiles its way to the driver with: the projection's kernels and Megatron's fused functions are Triton's.

    Source: ``triton/runtime/build.py``.
    """
    name = "compiler"
    given = environment.get("CC")
    candidates = [given] if given else ["gcc", "clang"]
    found = next((c for c in candidates if shutil.which(c, path=environment.get("PATH"))), None)
    if found is None:
        text = f"CC={given} is not there" if given else "none"
        return fail(name, f"{text}, which Triton needs to start kernels", "install gcc, or name a C compiler in CC")
    if not headers.is_file():
        return fail(name, f"{found}, but {headers} is missing, which Triton includes", "install Python's headers")
    return ok(name, f"{found}, for Triton's kernels")


def _shown(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.capability))
