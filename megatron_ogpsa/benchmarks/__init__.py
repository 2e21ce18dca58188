"""What the projection costs, measured against what the machine can do in the same minutes.

``python -m megatron_ogpsa.benchmarks.projection`` times its two passes over long vectors, and
``python -m megatron_ogpsa.benchmarks.step`` a training step with and without it. Figures are ratios of medians of
alternating runs: absolute times depend on who else is on the machine.
"""
