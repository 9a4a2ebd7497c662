"""`model.onnx` → a TensorRT network that is parsed, audited and ready to build. Start at `parse`.

`audit` and `quantized` hold the network to the contract and the manifest; `placeholders` empties its weights
where they stay outside the plan; `blame` tells which module of the model a message is about.
"""
