"""The machine: launch environment, CPU, GPU, watchdog."""
