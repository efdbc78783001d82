"""Benchmarks against dense torch.compile: `python -m benchmarks --help`."""
