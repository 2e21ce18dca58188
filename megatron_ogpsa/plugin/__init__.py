"""The plugin: a basis kept beside Megatron's optimizer, and what happens within its step."""
