"""What the user reads: tables, errors of several ranks, commands with progress, Megatron's log."""
