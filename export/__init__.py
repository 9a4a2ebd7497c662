"""Checkpoint → ONNX folder."""
