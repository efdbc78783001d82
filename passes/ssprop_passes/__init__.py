"""Graph transformations that make backward nodes sparse. Knows torch, nothing of ssprop_fx."""
