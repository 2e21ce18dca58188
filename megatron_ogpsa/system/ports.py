"""A port for ranks to meet at, which whoever is told it binds later."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

from megatron_ogpsa.errors import UserError

_PORTS = range(10000, 20000)
"""Below those of SLURM's jobs (megatron_ogpsa/cluster/slurm.py)."""

_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")

_USUALLY_OUTGOING = (32768, 60999)


def _outgoing_ports() -> tuple[int, int]:
    """The first and last port that Linux gives to outgoing connections."""
    try:
        first, last = map(int, _OUTGOING.read_text(encoding="ascii").split())
    except OSError:  # some containers mask /proc/sys
        return _USUALLY_OUTGOING
    return first, last


def free_port() -> int:
    """A port that nobody has here, and that no outgoing connection gets until it is bound.

    (If this machine gives all of them to outgoing connections, it is one of these.)

    Raises:
        UserError: there is none.
    """
    first, last = _outgoing_ports()
    # Training seeds the usual generator: two jobs of one node would then look at the same ports in the same order.
    shuffled = random.SystemRandom().sample(_PORTS, len(_PORTS))
    for port in sorted(shuffled, key=lambda port: first <= port <= last):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
    raise UserError(
        f"MASTER_PORT: no port from {_PORTS.start} to {_PORTS.stop - 1} is free on this node for ranks to meet at: "
        "end what has them, or run the stages one by one with --stage"
    )
