"""The part of Megatron-Bridge's callbacks that a run meets, by their names; compared with the real ones where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

VALID_EVENTS = frozenset(
    {"on_data_init_start", "on_checkpoint_save"}
    | {
        f"on_{phase}_{edge}"
        for phase in ("train", "eval", "test")
        for edge in ("start", "step_start", "step_end", "end")
    }
)


@dataclass
class CallbackContext:
    state: Any
    model: list[Any]
    user_state: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    scheduler: Any = None
    loss_dict: dict[str, Any] | None = None
    grad_norm: float | None = None
    skipped_iter: bool | None = None
    total_loss_dict: dict[str, Any] | None = None


class Callback:
    pass


def _nothing(self: Callback, context: CallbackContext) -> None:
    return None


for event in VALID_EVENTS:
    setattr(Callback, event, _nothing)


class CallbackManager:
    def __init__(self) -> None:
        self.user_state: dict[str, Any] = {}
        self._called: dict[str, list[Callable[[CallbackContext], None]]] = {event: [] for event in VALID_EVENTS}

    def add(self, callback: Callback | list[Callback]) -> None:
        for one in callback if isinstance(callback, list) else [callback]:
            for event, called in self._called.items():
                called.append(getattr(one, event))

    def fire(self, event_name: str, context: CallbackContext) -> None:
        for called in self._called[event_name]:
            called(context)
