"""Files, disks and processes, as the operating system has them; and which Megatron is there."""
