"""All evidence that needs a GPU, by one command, `python -m runner.benchmarks.gpu`: a module for each part."""
