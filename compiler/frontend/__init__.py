"""Ways into the graph IR: ONNX files and kedge's own nn modules."""
