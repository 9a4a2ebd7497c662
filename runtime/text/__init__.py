"""Text and messages → token ids, and token ids → text."""
