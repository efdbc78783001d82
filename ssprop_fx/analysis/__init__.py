"""Analysis: what is, or would be, sparse in a model."""
