"""How a converted layer becomes ONNX: find it, choose a lowering, emit placeholders, export, lower them; one step a file."""
