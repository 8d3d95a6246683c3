"""Metrics, figures and Weights & Biases."""
