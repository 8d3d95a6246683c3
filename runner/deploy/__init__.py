"""From a finished run to ONNX, engine and latency. Each step reads the files of the one before it."""
