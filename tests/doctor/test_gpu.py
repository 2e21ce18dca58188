"""What is said of GPUs, without one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megatron_ogpsa.doctor.gpu import Gpu, check_compiler, check_gpus
from megatron_ogpsa.doctor.machine import check_gpu_memory
from megatron_ogpsa.planning.arguments import _as_first_rank

HOPPER = Gpu(name="NVIDIA H200", capability=(9, 0), free=140 * 2**30, total=141 * 2**30)
BUSY = Gpu(name="NVIDIA H200", capability=(9, 0), free=20 * 2**30, total=141 * 2**30)
AMPERE = Gpu(name="NVIDIA A100", capability=(8, 0), free=80 * 2**30, total=80 * 2**30)


@pytest.mark.parametrize(
    ("gpus", "level", "words"),
    [
        ([HOPPER, HOPPER], "OK", "2 x NVIDIA H200 .* all free"),
        ([HOPPER, BUSY], "WARN", "GPU 1 has .* free"),
        ([HOPPER, AMPERE], "WARN", "the slowest sets the pace"),
    ],
)
def test_gpus_are_counted_and_seen_busy(gpus: list[Gpu], level: str, words: str) -> None:
    found = check_gpus(gpus, built_in=len(gpus), cuda_build="13.0")[0]
    assert found.level == level
    assert re.search(words, found.value)


@pytest.mark.parametrize(("gpu", "words"), [(HOPPER, "can .compute capability 9.0."), (AMPERE, "FP8 needs 8.9")])
def test_fp8_is_a_matter_of_the_oldest_gpu(gpu: Gpu, words: str) -> None:
    assert re.search(words, check_gpus([HOPPER, gpu], built_in=2, cuda_build="13.0")[1].value)


def test_kernels_need_a_c_compiler_and_pythons_headers(tmp_path: Path) -> None:
    headers = tmp_path / "Python.h"
    without = check_compiler({"PATH": str(tmp_path)}, headers)
    assert (without.level, without.remedy) == ("FAIL", "install gcc, or name a C compiler in CC")
    compiler = tmp_path / "gcc"
    compiler.touch(mode=0o755)
    for environment in ({"PATH": str(tmp_path)}, {"PATH": "", "CC": str(compiler)}):
        assert str(headers) in check_compiler(environment, headers).value
    assert check_compiler({"PATH": str(tmp_path), "CC": "/nowhere/cc"}, headers).value.startswith(
        "CC=/nowhere/cc is not"
    )
    headers.touch()
    assert check_compiler({"PATH": str(tmp_path)}, headers).level == "OK"
    assert check_gpus([HOPPER], built_in=1, cuda_build="13.0")[2].name == "compiler"


@pytest.mark.parametrize(("needed", "level"), [(60, "OK"), (140, "FAIL")])
def test_what_a_rank_keeps_is_held_against_a_gpu(needed: int, level: str) -> None:
    found = check_gpu_memory(80 * 2**30, needed * 2**30)
    assert found.level == level
    assert re.search("of a GPU's 85.9 GB", found.value)


def test_variables_that_ranks_get_are_no_fault_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron demands it of GPUs up to Hopper, and the command gives it to ranks."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    with _as_first_rank([], 8):
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    with _as_first_rank([], 8):
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
