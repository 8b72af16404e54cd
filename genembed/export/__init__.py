"""Models for others to run: merged weights, ONNX graphs and the loop over them."""
