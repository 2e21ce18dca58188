"""A training run of which every second step is projected and the others are plain, in one process.

```
torchrun --nproc-per-node 2 -m megatron_ogpsa.benchmarks.every_second_step CONFIG.yaml [flags]
```

It is ``megatron-ogpsa train``, a rank of it, and takes what that takes. Runs differ in speed by more than the projection
takes where a GPU waits for the host, or where others use the machine; neighbouring steps of one process have that in common.
Plain steps keep the basis in memory and do nothing with it. :mod:`megatron_ogpsa.benchmarks.training` starts it, and reads
its log.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, override

from megatron_ogpsa.benchmarks.speeds import is_projected
from megatron_ogpsa.cli.main import main as run_verb
from megatron_ogpsa.integration import stages
from megatron_ogpsa.integration.projection.run import ProjectionRun


class EverySecondStep(ProjectionRun):
    """The projection, switched off for steps with an odd number."""

    @override
    def before_step(self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], step: int) -> None:
        super().before_step(model, optimizer, forward_backward, step)
        assert self._ogpsa is not None
        self._ogpsa.enabled = is_projected(step + 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Be a rank of the run."""
    stages.ProjectionRun = EverySecondStep  # type: ignore[attr-defined]
    return run_verb(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
