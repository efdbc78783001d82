"""Runtime: which compiled form of a model runs in a step, and whether it was sparse."""
