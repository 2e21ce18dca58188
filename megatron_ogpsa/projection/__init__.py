"""Pure mathematics: tensors in, tensors out, no process groups and no Megatron.

* :mod:`.passes` multiplies long contiguous vectors block by block, in the kernels that the device has: :mod:`.cpu_kernels`
  with :mod:`.numba_kernels`, :mod:`.gpu_kernels` with :mod:`.triton_kernels`, or PyTorch's, tile by tile (:mod:`.segments`).
  :mod:`.pieces` cuts blocks for the kernels.
* :mod:`.basis` turns Gram matrices into orthonormal bases.
* :mod:`.removal` decides how much of each basis vector a gradient loses; :mod:`.conflict` does where only harm counts.
"""
