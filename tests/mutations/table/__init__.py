"""Mistakes that someone could make in this project, by room, and the tests that ought to notice each of them."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.authors_and_losses import AUTHORS_AND_LOSSES
from tests.mutations.table.blocks import BLOCKS
from tests.mutations.table.checkpoints import CHECKPOINTS
from tests.mutations.table.cluster import CLUSTER
from tests.mutations.table.conversion import CONVERSION
from tests.mutations.table.counting import COUNTING
from tests.mutations.table.evaluation import EVALUATION
from tests.mutations.table.examination import EXAMINATION
from tests.mutations.table.in_the_loop import IN_THE_LOOP
from tests.mutations.table.kernels import KERNELS
from tests.mutations.table.precision import PRECISION
from tests.mutations.table.recipes import RECIPE
from tests.mutations.table.reductions import REDUCTIONS
from tests.mutations.table.refresh import REFRESH
from tests.mutations.table.step import STEP
from tests.mutations.table.told import TOLD
from tests.mutations.table.transformer_engine import TRANSFORMER_ENGINE
from tests.mutations.table.untrusted import UNTRUSTED
from tests.mutations.table.watch import WATCH

MUTATIONS: tuple[Mutation, ...] = (
    *COUNTING,
    *REDUCTIONS,
    *BLOCKS,
    *PRECISION,
    *STEP,
    *REFRESH,
    *TOLD,
    *AUTHORS_AND_LOSSES,
    *KERNELS,
    *IN_THE_LOOP,
    *CHECKPOINTS,
    *CONVERSION,
    *EVALUATION,
    *WATCH,
    *CLUSTER,
    *UNTRUSTED,
    *RECIPE,
    *EXAMINATION,
    *TRANSFORMER_ENGINE,
)
