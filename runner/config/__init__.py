"""The types of experiments and recipes, and the options of `runner train`."""
