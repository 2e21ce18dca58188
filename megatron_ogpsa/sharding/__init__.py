"""From Megatron's optimizers to contiguous gradient shards with named blocks.

* :mod:`.names` gives every local parameter the name that it has in the unsharded model.
* :mod:`.logical` takes the logical tensors (q, k, v, gate, up) out of fused ones.
* :mod:`.ownership` says which copy of a parameter counts in a sum over ranks, and over which ranks the sum goes.
* :mod:`.gradients` finds where the optimizer's gradients lie in memory.

Nothing here changes a number; nothing here communicates, except the union of names when a plugin is attached.
"""
