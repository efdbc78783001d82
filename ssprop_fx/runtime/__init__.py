"""Runtime: chooses the compiled form of a model for each step, and checks that it was sparse."""
