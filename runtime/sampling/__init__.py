"""Logits + parameters → the next token."""
