"""From FFCV files to trained models, ONNX, TensorRT engines, latencies, and one report."""
