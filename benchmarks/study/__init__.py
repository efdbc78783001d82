"""What accuracy does sparse back-propagation reach for its cost? `python -m benchmarks.study`."""
