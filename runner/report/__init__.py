"""Compares runs: reads their folders, and nothing else. Never imports torch."""
