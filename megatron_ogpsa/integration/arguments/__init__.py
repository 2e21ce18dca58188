"""Flags: ours, Megatron's defaults by the machine, and what is refused at start."""
