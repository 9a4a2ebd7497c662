"""A checkpoint → what it computes: Hugging Face in float32, as the artifact rounds, and by the textbook."""
