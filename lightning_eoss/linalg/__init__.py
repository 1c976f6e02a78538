"""Tensors and products in, eigenpairs out; knows no network."""
