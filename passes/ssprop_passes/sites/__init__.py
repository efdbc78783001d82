"""Sites: what finds the backward of a layer in a graph."""
