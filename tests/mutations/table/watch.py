"""Mistakes in what the watch tells of a hang."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

STORY = "tests/watchdog/test_story.py"
LINE = f"{STORY}::test_the_line_names_ranks_steps_and_collectives"
BEHIND = f"{STORY}::test_who_is_behind"

WATCH = (
    Mutation(
        "told-of-the-end-and-speaking",
        "megatron_ogpsa/watchdog/watch.py",
        "            if link.ending is None:\n                raise\n            found = []",
        "            raise\n            found = []",
        ("tests/watchdog/test_watch.py::test_a_rank_that_knows_of_the_end_is_silent",),
        "a rank whose collective fails because the run has been ended prints a traceback, if the store has ended first",
    ),
    Mutation(
        "watch-names-ranks-from-one",
        "megatron_ogpsa/watchdog/story.py",
        'return f"rank {self.rank} (host {self.host}, pid {self.pid})"',
        'return f"rank {self.rank + 1} (host {self.host}, pid {self.pid})"',
        (LINE,),
        "ranks are counted from one, so that the neighbour is blamed",
    ),
    Mutation(
        "watch-names-the-next-step",
        "megatron_ogpsa/watchdog/story.py",
        'when = f"step {self.step}" if',
        'when = f"step {self.step + 1}" if',
        (LINE,),
        "the line names the step after the one that hangs",
    ),
    Mutation(
        "busy-ranks-blamed-beside-frozen-ones",
        "megatron_ogpsa/watchdog/story.py",
        'return dead or found["busy"] + found["left"]',
        'return dead + found["busy"] + found["left"]',
        (BEHIND,),
        "a rank that computes is blamed although another one is frozen",
    ),
    Mutation(
        "ranks-that-left-are-frozen",
        "megatron_ogpsa/watchdog/story.py",
        "    if now.has_left:\n",
        "    if now.has_left and before is not None and before.beat != now.beat:\n",
        (BEHIND,),
        "a rank that has finished, and so tells no more, is called frozen",
    ),
    Mutation(
        "newest-collective-in-flight",
        "megatron_ogpsa/watchdog/place.py",
        "return str(min(active,",
        "return str(max(active,",
        ("tests/watchdog/test_place.py::test_the_oldest_collective_of_the_flight_recorder",),
        "the collective that was queued last is named, not the one that all wait for",
    ),
    Mutation(
        "collective-named-by-its-innards",
        "megatron_ogpsa/watchdog/place.py",
        "collective = within[-1] if within",
        "collective = within[0] if within",
        ("tests/watchdog/test_place.py::test_a_collective_is_named_by_the_function_that_was_called",),
        "a function within PyTorch is named, not the one that was called",
    ),
    Mutation(
        "suspended-job-hangs",
        "megatron_ogpsa/watchdog/standing.py",
        "min(now - self._seen_at, LONGEST_GAP)",
        "(now - self._seen_at)",
        ("tests/watchdog/test_place.py::test_time_in_which_the_watch_was_stopped_itself_does_not_count",),
        "a job that was suspended for an hour is ended as one that hangs",
    ),
    Mutation(
        "attempt-counted-by-each-agent",
        "megatron_ogpsa/system/processes.py",
        'os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if keeps_store else "0"',
        'os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")',
        ("tests/watchdog/test_board.py::test_ranks_of_one_start_share_a_board",),
        "after a node was lost and came back, its ranks and the others do not hear of each other's hangs",
    ),
    Mutation(
        "own-error-ends-nobody",
        "megatron_ogpsa/watchdog/watch.py",
        "        link.ask(lambda board: board.announce(own))\n",
        "",
        ("tests/watchdog/test_watch.py::test_what_one_rank_alone_has_met_ends_the_others",),
        "ranks that wait for one whose disk is full learn of it from the end of their sockets",
    ),
)
