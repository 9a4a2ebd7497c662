"""A GPU that is none: doubles of TensorRT and the CUDA runtime whose engines run in ONNX Runtime.

Every name, argument and result is held to the installed modules (`spec`), every use to the rules of NVIDIA's
documentation (`rules`). Work waits in its stream until somebody synchronizes, fresh memory is full of NaN.
"""
