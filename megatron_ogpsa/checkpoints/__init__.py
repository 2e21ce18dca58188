"""Which checkpoints of a run are whole, and which one the run can go on from.

Files alone: nothing here communicates or imports Megatron. The training loop's side is
:mod:`megatron_ogpsa.integration.checkpoints.loading`.
"""

from megatron_ogpsa.checkpoints.choice import Examined, examine

__all__ = ["Examined", "examine"]
