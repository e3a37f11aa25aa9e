"""The models of the fake server, and what their gates do."""

import numpy as np

from conveyor.v1 import model_pb2

COUNTER = model_pb2.Model(
    name="counter",
    version=1,
    digest="digest-counter",
    description="A running sum of two features.",
    signature=model_pb2.Signature(
        input=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32,
            row_elements=2,
            row_bytes=8,
            labels=["left", "right"],
        ),
        output=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32,
            row_elements=2,
            row_bytes=8,
            labels=["left", "right"],
        ),
        output_activation="none",
    ),
    layers=[model_pb2.Layer(cell="rnn", size=2)],
    generative=True,
    streamable=True,
    carry_bytes=8,
    newest=True,
)
TOKENS = model_pb2.Model(
    name="tokens",
    version=2,
    digest="digest-tokens",
    description="A running sum of tokens.",
    signature=model_pb2.Signature(
        input=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_INT32,
            row_elements=1,
            row_bytes=4,
            vocabulary_size=4,
            labels=["a", "b", "c", "d"],
        ),
        output=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32, row_elements=3, row_bytes=12
        ),
        output_activation="log_softmax",
    ),
    layers=[model_pb2.Layer(cell="lstm", size=3, options={"peephole": "none"})],
    generative=True,
    streamable=True,
    newest=True,
)
LOOKER = model_pb2.Model(
    name="looker",
    version=1,
    digest="digest-looker",
    description="A running sum that looks at a memory.",
    signature=model_pb2.Signature(
        input=COUNTER.signature.input,
        output=COUNTER.signature.output,
        memory=model_pb2.TensorSignature(
            element_type=model_pb2.ELEMENT_TYPE_FLOAT32, row_elements=3, row_bytes=12
        ),
        output_activation="none",
    ),
    layers=[model_pb2.Layer(cell="gru", size=4), model_pb2.Layer(cell="lstm", size=5)],
    generative=True,
    streamable=True,
    newest=True,
)
GATES = {"rnn": "h", "lstm": "ifgoch", "gru": "rznh"}


def gate_values(layer: int, gate: str, first_step: int, length: int, units: int) -> np.ndarray:
    """What a gate does: (length, units), from 0 to 1, or from -1 to 1 where it is no share."""
    steps = np.arange(first_step, first_step + length)[:, None]
    values = ((steps * 7 + layer * 5 + ord(gate) + np.arange(units)) % 11) / 10
    return (values if gate in "iforz" else values * 2 - 1).astype("<f4")


def attention_weights(first_step: int, length: int, rows: int) -> np.ndarray:
    """Where a model looks: mostly at one row, which moves on with the step."""
    steps = np.arange(first_step, first_step + length)[:, None]
    here = steps % rows == np.arange(rows)
    return np.where(here, 0.75, 0.25 / max(rows - 1, 1)).astype("<f4")


def takes_tokens(model: model_pb2.Model) -> bool:
    """Whether its inputs are tokens."""
    return model.signature.input.element_type == model_pb2.ELEMENT_TYPE_INT32


def add(model: model_pb2.Model, carry: np.ndarray, row: bytes, memory: np.ndarray) -> bytes:
    """One step: changes the carry, returns the output row."""
    if takes_tokens(model):
        carry += np.frombuffer(row, "<i4")[0]
        return carry.tobytes()
    carry[:2] += np.frombuffer(row, "<f4")
    return (carry[:2] + memory.mean() if len(memory) else carry[:2]).tobytes()
