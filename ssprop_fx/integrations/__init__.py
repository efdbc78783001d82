"""Callbacks that step the scheduler inside other libraries' trainers; each a module of its own."""
