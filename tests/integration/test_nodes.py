"""Two nodes, each with a network of its own: an agent is lost and comes back, and the run ends as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.harness.preloaded import PreloadedCommand
from tests.integration.checkpoints import differences
from tests.integration.conftest import CONFIG, MICRO_BATCH_SIZE, REFERENCE_SAMPLES, Train, scalars
from tests.integration.namespaces import DEVICE, Node, NotAllowedError, two_nodes

LAYOUTS = {
    "tensor parallelism across nodes": "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 1 --num-query-groups 4",
    "tensor parallelism within nodes, stages across": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
}
"""Of two nodes with two ranks each, which are numbered node by node."""

SAVED, HELD = 3, 4
"""Steps of the configuration's checkpoint, and before which the second node is lost."""


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        with two_nodes() as both:
            yield both
    except NotAllowedError as reason:
        pytest.skip(f"network namespaces are not allowed here: {reason}")


class Agent:
    """The command on one node, which can be started again."""

    def __init__(
        self, preloaded: PreloadedCommand, node: Node, rank: int, first: Node, arguments: list[str], folder: Path
    ) -> None:
        environment = {"HOLD": str(HELD), "GLOO_SOCKET_IFNAME": DEVICE}
        environment |= {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": first.address}
        self._start = partial(
            preloaded.start,
            "tests.integration.holding",
            ["train", str(CONFIG), "--local-addr", node.address, *arguments],
            folder=folder,
            output=folder / f"node{rank}.log",
            environment=environment,
            agent=True,
            network=node.network,
        )
        self.start()

    def start(self) -> None:
        self.process = self._start()

    @property
    def output(self) -> str:
        """Of all its starts."""
        return self.process.output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_agent_is_killed_and_started_again(
    nodes: tuple[Node, Node], train: Train, preloaded: PreloadedCommand, inputs: Path, tmp_path: Path, layout: str
) -> None:
    """The undisturbed run has the same ranks on one node: where ranks are changes no bit."""
    flags = ["--tokenizer-model", str(inputs / "tokenizer"), "--ogpsa-train-data", str(inputs / "safety.jsonl")]
    flags += ["--ogpsa-reference", f"general={inputs / 'general.jsonl'}", *LAYOUTS[layout].split()]
    flags += [
        "--ogpsa-reference-samples",
        REFERENCE_SAMPLES,
        "--micro-batch-size",
        MICRO_BATCH_SIZE,
        "--num-layers",
        "2",
    ]
    restarts = ["--nproc-per-node", "2", "--max-restarts", "3", "--rdzv-timeout", "240"]
    arguments = [*restarts, *flags, *saving_to("lost")]
    agents = [Agent(preloaded, node, rank, nodes[0], arguments, tmp_path) for rank, node in enumerate(nodes)]
    try:
        wait_for(tmp_path / "held", agents)
        agents[1].process.kill()
        agents[1].start()
        codes = [agent.process.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.process.kill()
    output = "".join(agent.output for agent in agents)
    assert codes == [0, 0], output[-6000:]
    assert "All ranks are started again" in agents[0].output, output
    assert "heard of ranks [0, 1, 2, 3]" in agents[0].output, output  # whose agents have counted different restarts
    counts = {step: output.count(f"iteration {step:8d}/") for step in (SAVED, HELD, HELD + 1)}
    assert counts == {SAVED: 1, HELD: 2, HELD + 1: 1}, output  # what was not saved is done again

    outcome = train(*flags, *saving_to("whole"), plain=True)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    lost, whole = (scalars(tmp_path / name / "tensorboard", "lm loss")["lm loss"] for name in ("lost", "whole"))
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    assert lost == whole
    assert not differences(tmp_path / "lost", tmp_path / "whole")


def saving_to(folder: str) -> list[str]:
    return ["--save", folder, "--load", folder, "--tensorboard-dir", f"{folder}/tensorboard"]


def wait_for(path: Path, agents: list[Agent], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        ended = [agent.output[-3000:] for agent in agents if agent.process.wait(0) is not None]
        assert not ended, ended
        assert time.monotonic() < deadline, [agent.output[-3000:] for agent in agents]
        time.sleep(0.05)
