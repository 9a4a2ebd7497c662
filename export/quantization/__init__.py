"""Checkpoint + calibration text → scales by NVIDIA ModelOpt → quantized weights and Q/DQ nodes."""
