"""Training in FP8 through Transformer Engine, what is refused at start, and what a pass leaves behind; fp16's loss scale.

Nothing here imports Transformer Engine before a run asks for FP8: without it, and without a GPU, the package imports.
"""
