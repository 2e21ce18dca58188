"""What ranks decide together, and what a few of them do for all."""
