"""The demo: a small world in which the alignment tax, and what OGPSA recovers of it, can be measured in minutes on a CPU.

``tasks/``       what the small model knows: general abilities and the safety requests, as deterministic generators
``vocabulary``   the word-level tokenizer folder and its chat template
``benchmark``    files: training, reference, safety and evaluation sets, disjoint where they must be
``recipes``      the YAML configs that ``megatron-ogpsa train`` runs, one for each variant
``evaluate``     greedy answers and losses of Megatron checkpoints
``scoring``      accuracies, refusal rates and the share of the tax recovered: pure functions
``report``       terminal table, Markdown and CSV; ``plots`` draws the PNG files
``run``          the steps one after the other, behind the verb ``demo``
"""
