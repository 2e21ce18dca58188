"""Patches of Megatron as data, what its wheel needs, and Megatron without a GPU."""
