"""Conversions go through a model a layer and a file at a time, however many there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conversion.conftest import ROOT, TIMEOUT
from tests.conversion.memory import FROM_A_RUN, TO_HUGGING_FACE, TO_MEGATRON


@pytest.fixture(scope="module")
def measured() -> list[dict[str, int]]:
    """Of a few layers and of many."""
    command = [sys.executable, "-m", "tests.conversion.memory"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # stacks of threads would count
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("direction", [TO_MEGATRON, TO_HUGGING_FACE, FROM_A_RUN])
def test_memory_does_not_grow_with_the_number_of_layers(measured: list[dict[str, int]], direction: str) -> None:
    """Beside a layer and a file, half a layer is for objects of Python's and for pages that the system counts late.

    So much is also allowed from one model to the other. There are 16 layers between them: to keep more than a 32nd of each is
    to fail.
    """
    few, many = measured
    layer = file = many["largest file"]  # each layer has a file
    assert many["weights"] - few["weights"] > 15.9 * layer > 300 * 10**6  # headers differ by the digits in names
    assert many[direction] - few[direction] <= layer / 2
    assert many[direction] <= layer + file + layer / 2
