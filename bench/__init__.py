"""ppfr-bench: privacy attack-and-defence benchmark for face recognition."""

import os

__version__ = "0.1.0"

# Read by torch when it is imported. Representations of a batch are tens of megabytes, and faulting them in page by page
# takes a fifth of a training step on two cores; huge pages do not.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
