"""Data: datasets, loaders and their order."""
