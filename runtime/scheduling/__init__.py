"""Requests of any thread → rows, steps and tokens, all on one thread."""
