"""Everything about the machine: the launch environment, CPU and GPU settings, and the watchdog."""
