"""The run folder: its files, and what is in them."""
