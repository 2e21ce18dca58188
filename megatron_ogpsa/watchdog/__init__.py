"""Hangs: which rank has stopped, where the others wait for it, and an end to the run that says so.

A rank that waits for a frozen one raises after the process group's timeout, with a message that names nobody. Here a
thread in each rank looks once a second where its main thread stands (:mod:`.place`), and tells the job's store
(:mod:`.board`). A rank that has waited in one collective for too long reads what the others have told, finds those that
are behind (:mod:`.story`, which is pure), and ends the run on all ranks with one line.
"""

from megatron_ogpsa.watchdog.progress import progress
from megatron_ogpsa.watchdog.watch import HANG_EXIT_CODE, Watch

__all__ = ["HANG_EXIT_CODE", "Watch", "progress"]
