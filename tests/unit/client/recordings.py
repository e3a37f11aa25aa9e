"""Recordings of made-up steps, for what draws them."""

import numpy as np

from conveyor.v1 import model_pb2
from conveyor_client._nouns import ModelInfo, model_from_proto
from conveyor_client._trace import TracePiece, trace_from_pieces
from conveyor_client.cli._recording import Recording, Seen
from tests.unit.client.fake.models import COUNTER, LOOKER, TOKENS
from tests.unit.client.fake.sessions import State, make_trace

MEMORY = np.ones((6, 3), np.float32)
FULL, SUMMARY = 2, 1


def speller(labels: str | list[str] = "ab c\n$") -> model_pb2.Model:
    """A model that reads letters and says how likely each comes next."""
    model = model_pb2.Model()
    model.CopyFrom(TOKENS)
    model.name = "speller"
    signature = model.signature
    del signature.input.labels[:]
    signature.input.labels.extend(labels)
    signature.input.vocabulary_size = len(labels)
    signature.output.row_elements = len(labels)
    return model


def record(
    model: model_pb2.Model,
    steps: int,
    *,
    mode: int = FULL,
    gaps: tuple[int, ...] = (),
    first_step: int = 1,
    **bounds: int,
) -> Recording:
    """Records steps of a model of the small server; those of `gaps` have no trace."""
    info: ModelInfo = model_from_proto(model)
    recording = Recording(info, **bounds)
    memory = MEMORY if model.name == LOOKER.name else np.zeros((0, 1))
    state = State("one", model, memory=memory)
    size = info.output.row_elements
    for step in range(first_step, first_step + steps):
        if info.input.is_tokens:
            row = np.array(step % info.input.vocabulary_size, np.int32)
        else:
            row = np.array([step, -step / 1000], np.float32)[: info.input.row_elements]
        chances = np.where(np.arange(size) == (step + 1) % size, 0.9, 0.1 / (size - 1))
        piece = TracePiece(1, None if step in gaps else make_trace(state, mode, step, 1))
        recording.add(
            Seen(row, np.log(chances).astype(np.float32), trace_from_pieces(step, [piece]))
        )
    return recording


__all__ = ["COUNTER", "FULL", "LOOKER", "SUMMARY", "TOKENS", "record", "speller"]
