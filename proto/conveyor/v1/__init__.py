"""Version 1 of the contract; every `_pb2` module is generated from the .proto beside it."""
