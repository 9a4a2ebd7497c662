"""Engine folder + NVIDIA GPU → logits, through TensorRT or TensorRT-RTX; neither is imported before use."""
