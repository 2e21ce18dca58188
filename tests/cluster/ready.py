"""Where ranks say that they are ready, for :mod:`tests.cluster.ranks` and for who waits for them."""

from __future__ import annotations

from pathlib import Path


def ready_file(rank: int, start: int = 0) -> Path:
    """Holds the rank's process id, once it waits to be ended; of its own for each time that ranks were started."""
    return Path(f"ready-{rank}-of-start-{start}")
