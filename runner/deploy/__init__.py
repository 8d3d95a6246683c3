"""Exports runs to ONNX, builds engines, checks both, and measures latency; each step reads the previous one's files."""
