"""The run folder: its files and their contents."""
