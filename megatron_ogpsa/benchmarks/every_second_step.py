"""A training run of which every second step is projected and the others are plain, in one process.

```
torchrun --nproc-per-node 2 -m megatron_ogpsa.benchmarks.every_second_step CONFIG.yaml [flags]
```

It is ``megatron-ogpsa train``, a rank of it, and takes what that takes, without ``stages``. Runs differ in speed by more than
the projection takes where a GPU waits for the host, or where others use the machine; neighbouring steps of one process have
that in common. Plain steps keep the basis in memory and do nothing with it. :mod:`megatron_ogpsa.benchmarks.training` starts
it, and reads its log.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

from megatron_ogpsa.benchmarks.speeds import is_projected
from megatron_ogpsa.cli.main import main as run_verb
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.console.telling import tell_once
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu
from megatron_ogpsa.system.processes import is_rank

if TYPE_CHECKING:
    from megatron_ogpsa.integration.projection.run import ProjectionRun


def switching(run: type[ProjectionRun]) -> type[ProjectionRun]:
    """The projection, switched off for steps with an odd number."""

    class EverySecondStep(run):  # type: ignore[misc, valid-type]
        @override
        def before_step(
            self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], step: int
        ) -> None:
            super().before_step(model, optimizer, forward_backward, step)
            assert self._ogpsa is not None
            self._ogpsa.enabled = is_projected(step + 1)

    return EverySecondStep


def check(given: Sequence[str]) -> None:
    """Refuse what would start other processes, in which every step is projected.

    Raises:
        UserError: this is no rank, or the configuration has stages.
    """
    if not is_rank():
        raise UserError(
            f"it is a rank: start it with torchrun --nproc-per-node N -m {__package__}.every_second_step CONFIG.yaml"
        )
    if given and ConfigFile.read(Path(given[0])).stages:
        raise UserError(f"{given[0]}: 'stages' run one after the other; give a configuration of one")


def main(argv: Sequence[str] | None = None) -> int:
    """Be a rank of the run."""
    given = [*(sys.argv[1:] if argv is None else argv)]
    try:
        check(given)
        install_if_no_gpu()  # before anything of Megatron is imported
    except UserError as error:
        tell_once(str(error))
        return error.exit_code
    from megatron_ogpsa.integration import stages

    stages.ProjectionRun = switching(stages.ProjectionRun)  # type: ignore[attr-defined]
    return run_verb(["train", *given])


if __name__ == "__main__":
    sys.exit(main())
