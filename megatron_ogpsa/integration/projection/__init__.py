"""Refreshes in the loop: when, from which data, and what the log says of them."""
