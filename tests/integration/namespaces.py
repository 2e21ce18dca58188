"""Two nodes on one machine: network namespaces joined by a pair of virtual Ethernet devices (veth). Needs root.

A namespace lasts as long as a process in it. Each is held by one that the kernel ends with this process, like all that are
started in it, so that nothing of them stays behind however the tests end.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

DEVICE = "veth0"
"""Name of the device in both namespaces, each of which has it and the loopback alone."""

ADDRESSES = ("10.77.0.1", "10.77.0.2")

_TOOLS = ("ip", "nsenter", "setpriv", "unshare")
_ENDING_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


class NotAllowedError(Exception):
    """Why there can be no namespaces here."""


@dataclass(frozen=True)
class Node:
    """One of the two.

    Attributes:
        holder: id of the process that holds the namespace.
    """

    address: str
    holder: int

    @property
    def network(self) -> Path:
        """The namespace, as a file."""
        return Path(f"/proc/{self.holder}/ns/net")

    def command(self, *command: str) -> list[str]:
        """``command`` within this namespace; every part of the chain becomes the next, so that it keeps its process id."""
        return ["nsenter", f"--net={self.network}", *_ENDING_WITH_PARENT, *command]


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Both nodes, with addresses by which they reach each other and nothing else.

    Raises:
        NotAllowedError: no rights to make namespaces or devices, or no tools for it.
    """
    if missing := [tool for tool in _TOOLS if not shutil.which(tool)]:
        raise NotAllowedError(f"no {', '.join(missing)} (Debian's iproute2 and util-linux)")
    with ExitStack() as stack:
        first, second = (Node(address, stack.enter_context(_namespace())) for address in ADDRESSES)
        ends = [DEVICE, "netns", str(first.holder), "type", "veth", "peer", "name", DEVICE, "netns", str(second.holder)]
        _run(["ip", "link", "add", *ends])
        for node in (first, second):
            for settings in (f"address add {node.address}/24 dev {DEVICE}", f"link set {DEVICE} up", "link set lo up"):
                _run(node.command("ip", *settings.split()))
        yield first, second


@contextmanager
def _namespace() -> Iterator[int]:
    holding = ["unshare", "--net", *_ENDING_WITH_PARENT, "sh", "-c", "echo made; exec sleep infinity"]
    with subprocess.Popen(holding, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            if holder.stdout.readline() != "made\n":
                raise NotAllowedError(holder.stderr.read().strip())
            yield holder.pid
        finally:
            holder.kill()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotAllowedError(f"{' '.join(command)}: {done.stderr.strip()}")
