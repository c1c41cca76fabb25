"""How a converted layer becomes ONNX: find it, choose a lowering, emit placeholders, export, lower; one step a file."""
