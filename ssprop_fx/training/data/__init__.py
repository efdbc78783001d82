"""Datasets, loaders and sample order."""
