"""Architectures that papers define, or that adapt torchvision's models. Experiments refer to them by name."""
