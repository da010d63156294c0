"""Training sets too large for memory: the order in which faces are shown, the loader, and what is on disk."""
