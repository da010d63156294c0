"""Image quality, identity leakage, verification, confidence intervals, floors and throughput."""
