"""Datasets and identity-disjoint splits."""
