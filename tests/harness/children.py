"""A command that starts itself again in each way that the project's processes are started, and prints what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

HANDED_IN = "handed in"


def behave(how: str) -> None:
    """What a child does."""
    if how == "raises":
        raise ValueError("a message of its own")
    if how == "exits":
        sys.exit(7)
    if how == "waits":
        print("ready", flush=True)
        time.sleep(600)
    if how == "tells":
        told = {"torch": "torch" in sys.modules, "variable": os.environ.get("CHILD"), "folder": os.getcwd()}
        told |= {
            "leads": os.getsid(0) == os.getpid(),
            "ends by SIGTERM": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        }
        print(json.dumps(told | {"input": sys.stdin.read(), "arguments": sys.argv[1:]}))


def main() -> None:
    command = [sys.executable, "-u", "-m", __spec__.name]
    signal.signal(signal.SIGTERM, lambda *_: None)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        told = subprocess.run(
            [*command, "tells", "-m"],
            input=HANDED_IN,
            cwd=folder,
            env=os.environ | {"CHILD": "one"},
            start_new_session=True,
            capture_output=True,
            text=True,
            check=True,
        )
        results["tells"] = json.loads(told.stdout) | {"is there": told.stdout.count(folder) == 1}
        results["folder is left"] = os.path.isdir(folder)
    raised = subprocess.run([*command, "raises"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    results["raises"] = [raised.returncode, raised.stdout.splitlines()[-1]]
    results["exits"] = subprocess.call([*command, "exits"])
    with subprocess.Popen([*command, "waits"], stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        results["first line"] = waiting.stdout.readline()
        results["poll"] = waiting.poll()
        waiting.terminate()
    results["ended by"] = waiting.returncode
    results["another program"] = subprocess.run(["echo", "-m", "x"], capture_output=True, text=True).stdout
    print(json.dumps(results))


if __name__ == "__main__":
    behave(sys.argv[1]) if sys.argv[1:] else main()
