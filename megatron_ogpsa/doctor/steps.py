"""What the ranks of the collectives' check do, and what one of them is told. Standard library alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import timedelta

START, GROUPS, ALL = "start", "groups", "all ranks"
"""Steps before the axes: joining the default group, building Megatron's groups, and an all-reduce over all ranks."""

PATIENCE = timedelta(minutes=30)
"""Longer than any watcher waits: a stuck rank is ended from outside, by the one that can name it."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes; data parallelism is what they leave of the world.

    Attributes:
        order: of ranks, as Megatron takes it.
        gloo: whether training builds groups of gloo beside NCCL's.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    order: str = "tp-cp-ep-dp-pp"
    gloo: bool = True

    @property
    def axes(self) -> dict[str, int]:
        """Name → size of those over which something is reduced."""
        data = self.world // (self.tensor * self.pipeline * self.context)
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context, "data": data}
        sizes["expert"] = self.expert
        return {name: size for name, size in sizes.items() if size > 1}

    @property
    def steps(self) -> tuple[str, ...]:
        """What a rank does, in this order."""
        return (START, ALL, GROUPS, *self.axes) if self.axes else (START, ALL)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a rank is told.

    Attributes:
        host, port: of the store.
        prefix: of this check's keys in it.
        parent: the process that watches.
    """

    host: str
    port: int
    prefix: str
    parent: int
    layout: Layout

    def as_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Probe:
        """The opposite of :meth:`as_json`."""
        fields = json.loads(text)
        return cls(**(fields | {"layout": Layout(**fields["layout"])}))
