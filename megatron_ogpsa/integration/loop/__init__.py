"""Where this project acts within Megatron's training loop, and what watches it."""
