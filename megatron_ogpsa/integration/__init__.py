"""Everything that touches Megatron's training loop: arguments, data and loss hooks, the entry point, the CPU runtime."""
