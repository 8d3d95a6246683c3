"""From FFCV files to trained models, ONNX, TensorRT engines, latencies, and one report."""

__version__ = "0.1.0"
