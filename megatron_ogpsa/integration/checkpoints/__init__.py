"""Megatron's checkpoints: verified before they are loaded, whole once they are saved, on disks that fail."""
