"""Reference gradients through Megatron's schedules, leaving no trace."""
