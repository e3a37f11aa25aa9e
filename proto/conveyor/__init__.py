"""The contract of Conveyor: protobuf definitions and the Python code generated from them."""
