"""The door: thin servicers over `grpc.aio`.

Only this room imports grpc and the generated code.
"""
