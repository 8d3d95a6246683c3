"""Images to FFCV files: sources, the .beton writer, and the verification of what was written."""
