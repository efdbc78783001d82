"""Integrations with other libraries' trainers, DistributedDataParallel and optimizers."""
