"""One script a question: each prints a table and writes JSON. Ratios of things measured in turn in one run."""
