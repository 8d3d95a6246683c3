"""Benchmarks: each script answers one question with ratios of candidates that are measured in turn in one run.

A script prints a table and writes JSON.
"""
