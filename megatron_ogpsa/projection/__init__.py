"""Pure mathematics: tensors in, tensors out, no process groups and no Megatron.

* :mod:`.segments` multiplies long contiguous vectors block by block.
* :mod:`.basis` turns Gram matrices into orthonormal bases.
* :mod:`.removal` decides how much of each basis vector a gradient loses; :mod:`.conflict` does where only harm counts.
"""
