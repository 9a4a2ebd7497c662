"""ONNX folder + checkpoint → every stored weight compared: what the graph says of it, and its numbers."""
