"""Transformer Engine without a GPU: its own Python, from its wheel, over kernels written here in PyTorch.

What a run in FP8 does is decided in Transformer Engine's Python: modules, recipes, scales and histories, quantized
tensors, caches, checkpoints. Its kernels, a compiled extension that wants CUDA, multiply, normalise and round. So the
package named ``transformer_engine`` here is NVIDIA's, and ``transformer_engine_torch``, the extension, is
:mod:`~tests.transformer_engine.extension`: real FP8 values under real scales, products summed in fp32. What is shown with it
holds for the Python of that version on any device; not for its kernels, nor for its speed.

``wheel`` fetches the Python, ``importing`` puts the two together in a process, the other modules are the kernels.
"""
