"""The commands of `runner`: each module defines one command, with its options, help texts and action."""
