"""Converts images to FFCV files: sources, the .beton writer, and verification."""
