"""Which Megatron counts: the one that would be imported, which is a checkout's where a script is started in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOK = "from megatron_ogpsa.system import megatron as m; m.require_supported_megatron(); "
LOOK += "print(m.megatron_version(), m.megatron_folder())"


def _look(*places: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*places, ROOT)))}
    return subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=False)


def _checkout(folder: Path, info: str | None) -> Path:
    core = folder / "megatron/core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('it was imported')", encoding="utf-8")
    if info is not None:
        (core / "package_info.py").write_text(info, encoding="utf-8")
    return core


def test_a_checkout_of_the_series_counts_and_is_not_imported(tmp_path: Path) -> None:
    core = _checkout(tmp_path, "MAJOR = 0\nMINOR = 19\nPATCH = 1\nPRE_RELEASE = 'rc0'\n")
    assert _look(tmp_path).stdout.split() == ["0.19.1", str(core)]


def test_a_checkout_of_another_series_is_refused_whatever_pip_has_installed(tmp_path: Path) -> None:
    core = _checkout(tmp_path, "MAJOR = 0\nMINOR = 16\nPATCH = 1\n")
    last = _look(tmp_path).stderr.splitlines()[-1]
    assert f"UnsupportedError: megatron-core 0.16.1, in {core}, is not what megatron-ogpsa hooks into" in last
    assert "pip install 'megatron-core==0.19.*', or check out Megatron-LM at core_v0.19.*" in last


@pytest.mark.parametrize("info", [None, "something else"])
def test_what_says_no_version_is_taken_for_what_pip_has_installed(tmp_path: Path, info: str | None) -> None:
    core = _checkout(tmp_path, info)
    version, folder = _look(tmp_path).stdout.split()
    assert version.startswith("0.19.")
    assert folder == str(core)
