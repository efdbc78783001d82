"""Memory of saved activations against step time: pruned activations and their peers."""
