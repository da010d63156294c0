"""ppfr-bench: privacy attack-and-defence benchmark for face recognition."""

__version__ = "0.1.0"
