"""The modules that papers built themselves, or that torchvision's need changing for. Named by experiments."""
