"""How far this rank has come: a step, a phase, and a counter that moves while the run does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

START = "start"
"""The phase before the first step: the model is built and loaded, data sets are indexed."""


class Progress:
    """Told by hooks in the main thread, read by the watch's thread. Without a watch nobody reads it.

    Attributes:
        step: the step that is worked on, numbered as in Megatron's log, from 1; None before the first. A refresh belongs
            to the step that it precedes, a checkpoint to the step that it follows.
        pulses: forward passes of micro-batches, and beginnings and ends of phases.
    """

    def __init__(self) -> None:
        """Nothing has begun."""
        self.step: int | None = None
        self.pulses = 0
        self._phases: list[str] = []

    @property
    def phase(self) -> str:
        """The innermost phase."""
        phases = self._phases[-1:]  # one read: the main thread may leave the last one meanwhile
        return phases[0] if phases else START

    def pulse(self) -> None:
        """Count one more sign of life."""
        self.pulses += 1

    def begin_step(self, step: int) -> None:
        """Work on ``step`` from now on; phases that an exception has left open are over."""
        self.step = step
        self._phases = ["step"]
        self.pulse()

    def enter(self, phase: str) -> None:
        """Begin a phase within the one that is on."""
        self._phases.append(phase)
        self.pulse()

    def leave(self, phase: str) -> None:
        """End the phase that was entered last, if it is ``phase``."""
        if self._phases[-1:] == [phase]:
            self._phases.pop()
        self.pulse()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """``phase`` within the with statement; left open by an exception, so that it can be told where it was raised."""
        self.enter(phase)
        yield
        self.leave(phase)


progress = Progress()
"""Of this process."""
