"""Analysis: shows what is, or would be, sparse in a model."""
