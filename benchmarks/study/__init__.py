"""The accuracy that sparse back-propagation reaches for its cost: `python -m benchmarks.study`."""
