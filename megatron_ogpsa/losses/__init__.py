"""Loss functions, in the form that Megatron's pipeline schedules call."""
