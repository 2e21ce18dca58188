"""The abilities of the small model, in the order in which reports show them."""

from __future__ import annotations

from megatron_ogpsa.demo.tasks.arithmetic import ADDITION, MAXIMUM
from megatron_ogpsa.demo.tasks.base import Example, Task
from megatron_ogpsa.demo.tasks.language import LANGUAGE
from megatron_ogpsa.demo.tasks.lookup import CAPITAL
from megatron_ogpsa.demo.tasks.sequences import REVERSE, SHIFT, SORT

GENERAL_TASKS: tuple[Task, ...] = (ADDITION, MAXIMUM, REVERSE, SORT, SHIFT, CAPITAL, LANGUAGE)

__all__ = ["GENERAL_TASKS", "Example", "Task"]
