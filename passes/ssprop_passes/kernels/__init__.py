"""Kernels: operators, and the C++ behind some of them."""
