"""Sites: find the backward of each layer in a graph."""
