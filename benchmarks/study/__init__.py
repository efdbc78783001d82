"""What does sparse back-propagation buy in accuracy per cost? `python -m benchmarks.study`."""
