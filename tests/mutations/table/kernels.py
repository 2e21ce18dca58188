"""Mistakes in compiled passes, and in a basis that streams from the host."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

COMPILED = "tests/core/test_kernels.py::test_both_passes_are_those_of_pytorch"
TRITON = "tests/core/test_kernels.py::test_triton_computes_the_same_and_compiles"
BUFFERS = "tests/core/test_streaming.py::test_no_buffer_is_overwritten_early_or_read_early"

KERNELS = (
    Mutation(
        "piece-of-a-copy-counted",
        "megatron_ogpsa/projection/numba_kernels.py",
        "columns[p] + stop, sums[p])\n        _scale(sums[p], weights[p])\n",
        "columns[p] + stop, sums[p])\n",
        (COMPILED,),
        "compiled sums count copies that other ranks count too",
    ),
    Mutation(
        "pieces-of-all-spans-read-from-the-first",
        "megatron_ogpsa/projection/cpu_kernels.py",
        "return firsts_S[self._spans_P] +",
        "return firsts_S[0] +",
        (COMPILED,),
        "of several weights the first is read and changed in place of the others",
    ),
    Mutation(
        "threads-share-a-room",
        "megatron_ogpsa/projection/cpu_kernels.py",
        "        arrays, number = [_array(tensor) for tensor in whole],",
        "        shared = room() if room else None\n        room = (lambda: shared) if room else None\n"
        "        arrays, number = [_array(tensor) for tensor in whole],",
        ("tests/core/test_cpu_kernels.py::test_a_pass_is_one_call_for_each_thread",),
        "threads form their sums in one another's memory",
    ),
    Mutation(
        "threads-take-as-many-pieces-not-elements",
        "megatron_ogpsa/projection/cpu_kernels.py",
        "np.searchsorted(elements_P, np.arange(1, number) * elements_P[-1] // number)",
        "np.arange(1, number) * len(elements_P) // number",
        ("tests/core/test_cpu_kernels.py::test_a_pass_is_one_call_for_each_thread",),
        "where short weights lie together one thread has nearly all of the work",
    ),
    Mutation(
        "spans-of-other-lengths-are-read",
        "megatron_ogpsa/projection/cpu_kernels.py",
        "if (lengths := [span.numel() for span in spans]) != self._span_lengths:",
        "if (lengths := [span.numel() for span in spans]) == [-1]:",
        ("tests/core/test_cpu_kernels.py::test_nothing_is_read_beyond_a_span[short]",),
        "memory behind a vector is read, and written, if it is shorter than its layout",
    ),
    Mutation(
        "sums-given-to-blocks-in-order-of-pieces",
        "megatron_ogpsa/projection/numba_kernels.py",
        "row, own = out[blocks[p]], sums[p]",
        "row, own = out[min(p, out.shape[0] - 1)], sums[p]",
        (COMPILED,),
        "sums of pieces are added to other blocks than they are of",
    ),
    Mutation(
        "buffer-written-before-its-reader-is-done",
        "megatron_ogpsa/plugin/streaming.py",
        "                buffer.mark = self._lane.computed()\n",
        "                buffer.mark = buffer.mark\n",
        (BUFFERS,),
        "a copy waits for the copy before it, not for the computation that reads the buffer",
    ),
    Mutation(
        "buffer-read-before-its-copy",
        "megatron_ogpsa/plugin/streaming.py",
        "            self._lane.await_copy(buffer.mark)\n",
        "",
        (BUFFERS,),
        "the computation does not wait for the copy that it reads",
    ),
    Mutation(
        "first-tiles-of-another-layout",
        "megatron_ogpsa/plugin/streaming.py",
        "if [columns for columns, _ in self._fetched] != wanted:",
        "if not self._fetched:",
        ("tests/core/test_streaming.py::test_another_layout_or_a_pass_that_breaks_off_does_not_confuse_the_next",),
        "tiles that were fetched for one layout are taken for those of another",
    ),
    Mutation(
        "triton-stride-of-32-bits",
        "megatron_ogpsa/projection/triton_kernels.py",
        "    rows: tl.tensor,\n    row_stride: tl.int64,\n    out: tl.tensor,\n",
        "    rows: tl.tensor,\n    row_stride: tl.tensor,\n    out: tl.tensor,\n",
        (TRITON,),
        "the offset of a reference's row overflows at 2^31 elements of all of them",
    ),
    Mutation(
        "triton-annotation-that-does-not-compile",
        "megatron_ogpsa/projection/triton_kernels.py",
        "    weights: tl.tensor,\n    sums: tl.tensor,\n",
        "    weights: Tensor,\n    sums: tl.tensor,\n",
        (TRITON,),
        "a kernel that the interpreter runs does not compile",
    ),
    Mutation(
        "triton-fuses-what-it-writes",
        "megatron_ogpsa/projection/gpu_kernels.py",
        "                **self._at_once(vectors, part),\n                enable_fp_fusion=False,\n",
        "                **self._at_once(vectors, part),\n",
        (TRITON,),
        "products and sums are fused on a GPU, and a basis in host memory gives other bits",
    ),
    Mutation(
        "triton-tile-takes-the-first-pieces",
        "megatron_ogpsa/projection/gpu_kernels.py",
        "            first += number\n",
        "",
        (TRITON,),
        "each tile of a basis in host memory is worked on with the pieces of the first",
    ),
    Mutation(
        "triton-leaves-out-what-is-before-whole-blocks",
        "megatron_ogpsa/projection/triton_kernels.py",
        "    before = first - start\n    return number",
        "    before = 0\n    return number",
        (TRITON,),
        "elements before the first whole block of a piece are left out, and as many from its end are missing",
    ),
    Mutation(
        "host-memory-serves-again-at-once",
        "megatron_ogpsa/plugin/host_memory.py",
        "        if self._free:\n            self.wait()\n",
        "",
        ("tests/core/test_host_memory.py::test_memory_serves_again_once_no_view_has_it",),
        "memory of an old basis is written while copies of it to the GPU are under way",
    ),
    Mutation(
        "host-memory-of-other-sizes-is-hoarded",
        "megatron_ogpsa/plugin/host_memory.py",
        "        while self._free:\n            self.unregister(_address(self._free.pop()))\n",
        "",
        ("tests/core/test_host_memory.py::test_memory_that_does_not_fit_is_given_back_first",),
        "every size that references ever took stays locked",
    ),
    Mutation(
        "all-compile-at-once",
        "megatron_ogpsa/projection/cpu_kernels.py",
        "        lock.acquire()\n",
        "        lock.acquire(blocking=False)\n",
        ("tests/core/test_cpu_kernels.py::test_processes_compile_one_after_the_other",),
        "one process's machine code may be kept under the name of another's",
    ),
    Mutation(
        "compiling-waits-for-a-stopped-process",
        "megatron_ogpsa/projection/cpu_kernels.py",
        "    with suppress(OSError, NotImplementedError):",
        "    with suppress(NotImplementedError):",
        ("tests/core/test_cpu_kernels.py::test_a_lock_that_is_not_to_be_had_keeps_nobody_from_compiling",),
        "a run ends where a lock is not to be had in a minute",
    ),
)
