"""The Open Inference Protocol, for programs written for Triton's sequence models.

A sequence is a session: nothing in here keeps state of a sequence.
"""
