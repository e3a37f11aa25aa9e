"""Measurements, each beside its comparator, and the demonstration.

Run from the root of the repository.
"""

import os

# Before grpc is imported: it has a line to say about every connection that ends.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
