"""Accuracy over seconds, of rules for samples and their peers: `python -m benchmarks.recipe`."""
