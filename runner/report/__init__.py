"""Reports that compare runs, made from the run folders alone. Never imports torch."""
