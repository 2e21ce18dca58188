"""Configurations: YAML whose keys are flags, with the line of each."""
