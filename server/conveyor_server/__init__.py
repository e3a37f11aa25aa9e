"""The Conveyor server: stateful recurrent sessions over gRPC."""
