"""All measurements that need a GPU, run by `python -m runner.benchmarks.gpu`; each part is a module."""
