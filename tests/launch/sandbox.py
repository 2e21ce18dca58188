"""A copy of the project's scripts in a folder with a space, and a PATH on which only chosen Pythons are found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
FAKE_PYTHON = Path(__file__).with_name("fake_python.sh")

_TOOLS = "awk bash cat chmod cp cut df dirname du env flock grep ls mkdir mv rm sleep tail touch".split()


class Sandbox:
    """Runs the scripts of a copy of the project in which pip and the interpreter are fakes."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "a project"
        self.tools = folder / "bin"
        self.pyenv = folder / "pyenv root"
        self.pip_log = folder / "pip.log"
        self.environment = {
            "PATH": str(self.tools),
            "HOME": str(folder),
            "PYENV_ROOT": str(self.pyenv),
            "FAKE_PIP_LOG": str(self.pip_log),
        }
        shutil.copytree(PROJECT_ROOT / "launch", self.project / "launch")
        shutil.copytree(PROJECT_ROOT / ".ci", self.project / ".ci")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(PROJECT_ROOT / name, self.project)
        self.tools.mkdir()
        for tool in _TOOLS:
            if found := shutil.which(tool):
                (self.tools / tool).symlink_to(found)

    def add_python(self, path: Path, **fake: str) -> Path:
        """Put a fake interpreter at ``path``; ``fake`` sets its ``FAKE_*`` variables, by their lower-case rest."""
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = "".join(f"export FAKE_{name.upper()}={value}\n" for name, value in fake.items())
        path.write_text(f"#!/usr/bin/env bash\n{settings}" + FAKE_PYTHON.read_text().partition("\n")[2])
        path.chmod(0o755)
        return path

    def add_command(self, name: str, body: str) -> Path:
        """Put a shell script on PATH in place of whatever has the name."""
        path = self.tools / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return path

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start ``bash command...`` from a folder that is not the project's."""
        return subprocess.Popen(
            ["bash", *map(str, command)],
            cwd=self.tools.parent,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``bash command...`` and wait for its end."""
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def find_python(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the search for an interpreter alone."""
        source = f"source '{self.project}/launch/environment.sh'"
        return self.run("-c", f'set -euo pipefail; {source}; python=$(find_python); echo "$python"', **environment)

    def installations(self) -> list[str]:
        """What pip was asked to install, and finished."""
        lines = self.pip_log.read_text().splitlines() if self.pip_log.exists() else []
        return [line.removeprefix("finished ") for line in lines if line.startswith("finished ")]

    @property
    def venv(self) -> Path:
        """Where the scripts make their environment by default."""
        return self.project / ".venv"

    def script(self, name: str) -> Path:
        """A script in ``launch/``."""
        return self.project / "launch" / name
