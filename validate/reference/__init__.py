"""A checkpoint → what it computes: Hugging Face in float32, and as the artifact rounds."""
