"""The Python of Transformer Engine: the wheel named ``transformer_engine``, 1 MB, without its libraries.

It lies in a folder of its own, not among the installed packages: on its own it raises when it is imported, and Megatron
would import it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "2.20.2"
"""The newest that the emulated extension was written against."""

SECONDS = 120


def python_of_wheel() -> Path:
    """A folder for ``sys.path`` that holds ``transformer_engine``; fetched once for an environment.

    Raises:
        OSError: the wheel cannot be had; with pip's reason.
    """
    folder = Path(sys.prefix) / "transformer-engine-python" / VERSION
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            target = Path(scratch) / "site"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
            try:
                done = subprocess.run(
                    [*command, f"transformer_engine=={VERSION}"],
                    capture_output=True,
                    text=True,
                    timeout=SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise OSError(f"no Transformer Engine {VERSION} within {SECONDS} s") from error
            if done.returncode != 0:
                raise OSError(f"no Transformer Engine {VERSION}: {done.stderr.strip().splitlines()[-1:]}")
            shutil.rmtree(target / "transformer_engine" / "jax")
            try:
                target.rename(folder)
            except OSError:
                if not folder.is_dir():  # or another process was faster
                    raise
    return folder
