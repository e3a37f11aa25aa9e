"""The Open Inference Protocol; every `_pb2` module is generated from the .proto beside it."""
