"""Loads gRPC without its own handlers of forks; it has to be the first import of the package.

In a child those handlers start gRPC's threads again in the midst of what the parent's were doing,
which crashes some children that never make a call. They can be had by setting the variable. gRPC
reads it while it is imported, so it is taken back for the sake of programs started from here.
"""

import os

_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"

if _VARIABLE in os.environ:
    import grpc
else:
    os.environ[_VARIABLE] = "0"
    import grpc

    del os.environ[_VARIABLE]

__all__ = ["grpc"]
