"""Mistakes in how nodes find each other, and in restarts."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

RESOLVED = "tests/cluster/test_settings.py::test_resolved"
ANEW = "tests/cluster/test_restarts.py::test_runs_that_would_begin_anew"

CLUSTER = (
    Mutation(
        "node-rank-from-the-wrong-variable",
        "megatron_ogpsa/cluster/settings.py",
        '"node-rank": "NODE_RANK"',
        '"node-rank": "RANK"',
        (RESOLVED,),
        "each node takes its number from the variable of a rank",
    ),
    Mutation(
        "slurm-node-from-the-task",
        "megatron_ogpsa/cluster/slurm.py",
        '_variable(environment, "SLURM_NODEID")',
        '_variable(environment, "SLURM_LOCALID")',
        (RESOLVED,),
        "each node of a SLURM step takes itself for node 0",
    ),
    Mutation(
        "file-wins-over-the-environment",
        "megatron_ogpsa/cluster/settings.py",
        "    given |= {key: Value(environment[name], name) for",
        "    given = given or {key: Value(environment[name], name) for",
        (RESOLVED,),
        "NNODES and its like are looked at only where the configuration says nothing at all",
    ),
    Mutation(
        "slurm-names-lose-their-zeros",
        "megatron_ogpsa/cluster/slurm.py",
        "str(number).zfill(len(first))",
        "str(number)",
        ("tests/cluster/test_settings.py::test_slurms_lists_of_nodes",),
        "node[001-003] are looked for as node1 to node3",
    ),
    Mutation(
        "restart-loads-elsewhere",
        "megatron_ogpsa/cluster/restarts.py",
        "if not load or os.path.abspath(str(load)) != os.path.abspath(str(save)):",
        "if not load:",
        (ANEW,),
        "a run that loads another folder than it saves to begins anew at each restart",
    ),
    Mutation(
        "rank-0-leaves-first",
        "megatron_ogpsa/pipeline/ranks.py",
        "            if self.rank == 0:\n                self._store.wait(",
        "            if self.rank < 0:\n                self._store.wait(",
        ("tests/pipeline/test_ranks.py::test_ranks_leave_together",),
        "a job of several stages that has finished ends with exit code 1 on the ranks that read the last answer late",
    ),
    Mutation(
        "children-of-lost-ranks-stay",
        "megatron_ogpsa/cluster/agent.py",
        "            if process.poll():",
        "            if process.poll() is None:",
        ("tests/cluster/test_agent.py::test_agents",),
        "the writer of --async-save keeps memory of the GPU after its rank was killed",
    ),
    Mutation(
        "signal-forgotten-between-stages",
        "megatron_ogpsa/pipeline/ranks.py",
        '"told" if signals else ""',
        '""',
        ("tests/pipeline/test_ranks.py::test_ranks_leave_together[a signal that comes too late]",),
        "SIGTERM in a stage's last seconds is forgotten, and the next stage begins",
    ),
    Mutation(
        "pods-variables-are-a-ranks",
        "megatron_ogpsa/system/processes.py",
        '    if "LOCAL_RANK" not in environment:\n',
        '    if "RANK" not in environment:\n',
        ("tests/cluster/test_starts.py::test_a_pods_variables_are_not_a_ranks",),
        "a pod of several GPUs becomes one rank, on its first GPU",
    ),
    Mutation(
        "named-step-is-gone-back-to",
        "megatron_ogpsa/cluster/restarts.py",
        'if step := given.ckpt_step or written.get("ckpt-step"):',
        'if step := given.ckpt_step and written.get("ckpt-step"):',
        ("tests/cluster/test_restarts.py::test_runs_that_would_begin_anew[a step]",),
        "each restart goes back to the step that --ckpt-step names, and what was trained since is lost",
    ),
    Mutation(
        "ranks-just-started-are-not-told",
        "megatron_ogpsa/cluster/agent.py",
        "        has_ranks = any(self._ranks())",
        "        has_ranks = self._worker_group.state == WorkerState.HEALTHY",
        ("tests/cluster/test_signals.py::test_ranks_that_have_just_been_started_get_the_signal",),
        "a signal that comes before torch calls new ranks healthy ends the agent and leaves them behind",
    ),
    Mutation(
        "others-wait-for-a-node-that-ends",
        "megatron_ogpsa/cluster/agent.py",
        "            self._end_run(worker_group, self._ended_by(self._told))\n            raise",
        "            raise",
        ("tests/cluster/test_signals.py::test_ranks_are_not_started_again_after_a_signal",),
        "nodes that meet again are not told that one of them was told to end, and wait for its ranks",
    ),
    Mutation(
        "waiting-for-an-ended-ranks-line",
        "megatron_ogpsa/console/telling.py",
        "        if _is_there(told, TELLING_SECONDS):\n            return\n",
        "        if _is_there(told, TELLING_SECONDS) or turn == 0:\n            return\n",
        ("tests/console/test_telling.py::test_what_an_ended_rank_was_to_write_another_writes",),
        "a rank that has claimed an error and is ended before it writes it leaves the user without a line",
    ),
    Mutation(
        "claims-of-one-start-hold-for-the-next",
        "megatron_ogpsa/console/telling.py",
        'f"{start} {key or message}"',
        'f"{key or message}"',
        ("tests/console/test_telling.py::test_ranks_that_are_started_again_tell_it_again",),
        "ranks that are started again and fail the same way end without a word",
    ),
    Mutation(
        "commands-outlive-who-has-started-them",
        "megatron_ogpsa/console/commands.py",
        "                if process.poll() is None:  # Ctrl-C or SIGTERM",
        "                if process.poll() == 0:  # Ctrl-C or SIGTERM",
        ("tests/console/test_commands.py::test_told_to_end_it_ends_the_step_first",),
        "the demo that is ended by SIGTERM leaves its training running",
    ),
)
