"""Readers of face data, one file per format."""
