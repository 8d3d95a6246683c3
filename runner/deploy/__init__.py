"""Exports runs to ONNX, builds engines, scores both, and measures latencies; each step reads the files of the last."""
