"""The arithmetic: state pools, kernels and the ragged batch.

Everything above sees only `engine.port`.
"""
