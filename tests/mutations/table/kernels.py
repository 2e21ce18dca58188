"""Mistakes in compiled passes, and in a basis that streams from the host."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

COMPILED = "tests/core/test_kernels.py::test_both_passes_are_those_of_pytorch"
BUFFERS = "tests/core/test_streaming.py::test_no_buffer_is_overwritten_early_or_read_early"

KERNELS = (
    Mutation(
        "piece-of-a-copy-counted",
        "megatron_ogpsa/projection/cpu_kernels.py",
        "stop + shift, sums[p])\n        sums[p] *= weights[p]\n",
        "stop + shift, sums[p])\n",
        (COMPILED,),
        "compiled sums count copies that other ranks count too",
    ),
    Mutation(
        "sums-given-to-blocks-in-order-of-pieces",
        "megatron_ogpsa/projection/pieces.py",
        "ordered_PJ = sums_PJ[self._order_P]",
        "ordered_PJ = sums_PJ",
        (COMPILED,),
        "sums of pieces are added by block without being put in order of blocks",
    ),
    Mutation(
        "buffer-written-before-its-reader-is-done",
        "megatron_ogpsa/streaming.py",
        "                buffer.mark = self._lane.computed()\n",
        "                buffer.mark = buffer.mark\n",
        (BUFFERS,),
        "a copy waits for the copy before it, not for the computation that reads the buffer",
    ),
    Mutation(
        "buffer-read-before-its-copy",
        "megatron_ogpsa/streaming.py",
        "            self._lane.await_copy(buffer.mark)\n",
        "",
        (BUFFERS,),
        "the computation does not wait for the copy that it reads",
    ),
    Mutation(
        "first-tiles-of-another-layout",
        "megatron_ogpsa/streaming.py",
        "if [columns for columns, _ in self._fetched] != wanted:",
        "if not self._fetched:",
        ("tests/core/test_streaming.py::test_another_layout_or_a_pass_that_breaks_off_does_not_confuse_the_next",),
        "tiles that were fetched for one layout are taken for those of another",
    ),
)
