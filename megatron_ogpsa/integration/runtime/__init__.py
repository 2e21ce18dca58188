"""Patches of Megatron as data, and Megatron without a GPU."""
