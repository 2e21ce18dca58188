"""What the user is told of ranks and their ends."""

from __future__ import annotations

import os


def described(exit_code: int) -> str:
    """An exit code in words; negative ones are signals."""
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"


def say(text: str) -> None:
    """Tell the user, among what the ranks write."""
    os.write(2, f"megatron-ogpsa: {text}\n".encode())  # one write, so that no other process's line gets into it
