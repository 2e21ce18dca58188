"""What is examined, in which order: the machine, each stage of the configuration, and what all stages share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ogpsa.doctor import environment, machine
from megatron_ogpsa.doctor.findings import Finding, Report, made, not_made, ok, warn
from megatron_ogpsa.doctor.gpu import Gpu, built_in_gpus, check_gpus, visible_gpus
from megatron_ogpsa.doctor.world import MOST_RANKS_ON_CPU, World, can_start, find_world
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.open_files import limits_at_start
from megatron_ogpsa.system.processes import is_rank, require_common_count

if TYPE_CHECKING:
    from megatron_ogpsa.configuration.config_file import ConfigFile
    from megatron_ogpsa.doctor.ranks import Connections
    from megatron_ogpsa.doctor.stage import FlagsOf, Stage
    from megatron_ogpsa.doctor.steps import Layout

COMMAND = "-m megatron_ogpsa.cli.main doctor"

COLLECTIVES_NEED = ("torch", "megatron-core", "communication")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks for.

    Attributes:
        config: path of a configuration; None to look at the machine alone.
        overrides: flags that win over the file.
        num_ranks: ``--nproc-per-node``, where it is given.
        nodes: ``--nnodes``, likewise.
        stage: of a file with stages, the only one to examine.
    """

    config: Path | None
    overrides: list[str] = field(default_factory=list)
    num_ranks: int | None = None
    nodes: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of Megatron as the configuration has it; without stages it has no name.

    Attributes:
        previous: where the stage before it saves.
    """

    name: str
    flags_of: FlagsOf
    previous: Path | None


class Examination:
    """One call of the command."""

    def __init__(self, request: Request, report: Report, connections: Connections) -> None:
        """``connections``: how ranks are started for the collectives."""
        self._request = request
        self._report = report
        self._connections = connections
        self._gpus: list[Gpu] = []
        self._config: ConfigFile | None = None
        self._runs: list[Run] = []
        self._world = World(size=None, local=1)

    def make(self) -> int:
        """Examine everything; returns the exit code."""
        reading = made("file", self._read) if self._request.config else []  # it may say how many ranks there are
        if self._config is not None:
            reading += made("start", self._look_at_start)
        self._examine_environment()
        if self._request.config is None:
            if self._world.size and self._world.size > 1:
                self._report.begin("connections")
                self._examine_collectives([self._bare_layout(self._world.size)])
            return self._report.exit_code
        self._report.begin(str(self._request.config))
        for finding in reading:
            self._report.add(finding)
        stages = [self._examine_run(run) for run in self._runs]
        if self._config is not None and self._config.stages and stages:
            self._report.begin(f"{self._request.config}, all stages")
        if stages:
            self._examine_disk(stages)
            layouts = [stage.layout for stage in stages if stage.layout is not None]
            self._examine_collectives(list(dict.fromkeys(layouts)))
        return self._report.exit_code

    def _examine_environment(self) -> None:
        report = self._report
        report.begin("environment")
        report.examine("Python", environment.check_python)
        report.examine("torch", environment.check_torch)
        report.examine("GPU", self._look_for_gpus, needs=("torch",))
        launch = self._config.launch if self._config else {}
        report.examine("nodes", lambda: self._count(launch))
        has_gpu, ranks = bool(self._gpus), self._world.local
        report.examine("communication", lambda: machine.check_communication(has_gpu=has_gpu), needs=("torch",))
        report.examine("megatron-core", environment.check_megatron, needs=("torch",))
        report.examine("Transformer Engine", lambda: environment.check_transformer_engine(has_gpu=has_gpu))
        report.examine("Apex", environment.check_apex)
        report.examine("libraries", environment.check_libraries)
        report.examine("host memory", lambda: machine.check_memory(machine.available_memory(), ranks=ranks))
        report.examine("/dev/shm", machine.check_shared_memory)
        report.examine("open files", self._look_at_open_files)
        report.examine("OMP_NUM_THREADS", lambda: machine.check_threads(ranks=ranks))

    def _count(self, launch: dict[str, str]) -> Finding:
        request = self._request
        self._world = find_world(request.num_ranks, launch, nodes=request.nodes, gpus=len(self._gpus))
        size, local = self._world.size, self._world.local
        if size is None:
            return ok("nodes", "nobody has said how many ranks there are: say --nproc-per-node and --nnodes")
        return ok("nodes", f"{-(-size // local)} of {local} rank{'s' * (local > 1)}")

    def _look_at_open_files(self) -> Finding:
        world = self._world
        return machine.check_open_files(limits_at_start(), num_ranks=world.size, by_torchrun=world.is_job)

    def _look_for_gpus(self) -> list[Finding]:
        import torch

        self._gpus = visible_gpus()
        return check_gpus(self._gpus, built_in=built_in_gpus(), cuda_build=torch.version.cuda)

    def _read(self) -> Finding:
        """The configuration, and the runs that it stands for."""
        from megatron_ogpsa.configuration.config_file import ConfigFile
        from megatron_ogpsa.pipeline.plan import plan_stages

        request = self._request
        assert request.config is not None
        config = ConfigFile.read(request.config)
        if not config.stages:
            if request.stage:
                raise UserError(f"--stage {request.stage}: {config.path} has no 'stages': leave the flag out")
            self._runs = [Run("", _flags_of(config, request.overrides), None)]
        else:
            if request.stage not in (None, *config.stages):
                raise UserError(f"--stage {request.stage}: the file has the stages {', '.join(config.stages)}")
            self._runs = [
                Run(stage.name, stage.flags, stage.previous.folder if stage.previous else None)
                for stage in plan_stages(config, request.overrides)
                if request.stage in (None, stage.name)
            ]
        self._config = config
        keys = sum(map(len, (config.entries, *config.stages.values())))
        return ok("file", f"{keys} keys" + (f", stages {', '.join(config.stages)}" if config.stages else ""))

    def _look_at_start(self) -> Finding:
        """What training refuses before it starts a rank, or as one: stages that do not follow, restarts that begin anew."""
        from megatron_ogpsa.pipeline.plan import plan_stages
        from megatron_ogpsa.pipeline.progress import state_of

        config, request = self._config, self._request
        assert config is not None
        if is_rank():
            self._look_as_rank(config)
        else:
            self._look_as_launcher(config)
        if not config.stages:
            return ok("start", "as train would")
        stages = plan_stages(config, request.overrides)
        states = [f"{stage.name} is {state_of(stage)}" for stage in stages if request.stage in (None, stage.name)]
        return ok("start", "; ".join(states))

    def _look_as_rank(self, config: ConfigFile) -> None:
        """Others have started the ranks, and start them again."""
        from megatron_ogpsa.cluster.meant import require_meant_as_rank
        from megatron_ogpsa.cluster.restarts import require_resumable_ranks

        request = self._request
        given = {"nproc-per-node": request.num_ranks, "nnodes": request.nodes}
        require_meant_as_rank({key: str(value) for key, value in given.items() if value}, config.launch)
        require_common_count()
        require_resumable_ranks(config, request.overrides)

    def _look_as_launcher(self, config: ConfigFile) -> None:
        from megatron_ogpsa.cluster.restarts import require_resumable
        from megatron_ogpsa.cluster.settings import launch_settings

        somewhere = {"MASTER_ADDR": "localhost"}  # where nodes will meet is not known here
        flags = {"nnodes": self._request.nodes} if self._request.nodes else {}
        settings = launch_settings(flags, config.launch, somewhere | dict(os.environ))
        require_resumable(config, self._request.overrides, settings)

    def _examine_run(self, run: Run) -> Stage:
        from megatron_ogpsa.doctor.stage import Stage

        if run.name:
            self._report.begin(f"{self._request.config}, stage {run.name}")
        generation = min((gpu.capability[0] for gpu in self._gpus), default=None)
        stage = Stage(run.flags_of, self._world, generation=generation, previous=run.previous)
        stage.examine(self._report)
        return stage

    def _examine_disk(self, stages: Sequence[Stage]) -> None:
        from megatron_ogpsa.doctor.disk import check_disk

        savings = [stage.saving for stage in stages if stage.saving is not None]
        if savings:
            self._report.examine("disk space", lambda: check_disk(savings))
        elif all(stage.is_measured for stage in stages):
            text = "no --save: nothing will be kept"
            self._report.add(warn("disk space", text, "name a folder as --save, unless this is a trial"))
        else:
            self._report.add(not_made("disk space", "model"))

    def _examine_collectives(self, layouts: Sequence[Layout]) -> None:
        if not layouts:
            self._report.add(not_made("all-reduce", "layout"))
        for layout in layouts:
            if self._world.is_job or can_start(layout.world, gpus=len(self._gpus)):
                check = lambda layout=layout: self._connections.findings(layout)  # noqa: E731
                self._report.examine("all-reduce", check, needs=COLLECTIVES_NEED)
            else:
                self._report.add(self._too_many(layout.world))

    def _too_many(self, ranks: int) -> Finding:
        gpus = len(self._gpus)
        here = (
            f"has {gpus} GPU{'s' * (gpus > 1)}" if gpus else f"has no GPU, so that up to {MOST_RANKS_ON_CPU} are tried"
        )
        each = gpus or 8
        arguments = f"{COMMAND} {self._request.config or ''}".strip()
        return warn(
            "all-reduce",
            f"not tried: there will be {ranks} ranks, and this machine {here}",
            f"on every node: torchrun --nnodes {-(-ranks // each)} --nproc-per-node {each} "
            f"--rdzv-backend c10d --rdzv-endpoint HOST:29500 {arguments}",
        )

    @staticmethod
    def _bare_layout(ranks: int) -> Layout:
        from megatron_ogpsa.doctor.steps import Layout

        return Layout(world=ranks)


def _flags_of(config: ConfigFile, overrides: list[str]) -> Callable[[argparse.ArgumentParser], list[str]]:
    return lambda parser: config.as_flags(parser, overrides)
