"""Descriptions of small models, for everything above the engine."""

from dataclasses import replace

from conveyor_server.core import InputKind, LayerInfo, ModelInfo, ModelKey

FEATURES = ModelInfo(
    key=ModelKey("weather", 1),
    digest="sha256:" + "ab" * 32,
    description="two features in, three out",
    input_kind=InputKind.FEATURES,
    input_size=2,
    vocabulary_size=0,
    output_size=3,
    activation="linear",
    input_labels=("temperature", "hour"),
    output_labels=("low", "mid", "high"),
    embedding_size=0,
    layers=(LayerInfo("lstm", 4, 0),),
    carry_bytes=32,
    parameters=150,
    step_multiply_adds=140,
    chunk_steps_max=16_384,
)
TOKENS = replace(
    FEATURES,
    key=ModelKey("spelling", 1),
    digest="sha256:" + "cd" * 32,
    description="eight tokens",
    input_kind=InputKind.TOKENS,
    input_size=1,
    vocabulary_size=8,
    output_size=8,
    activation="log_softmax",
    input_labels=(),
    output_labels=tuple("abcdefgh"),
    embedding_size=4,
)
LOOPED = replace(
    FEATURES,
    key=ModelKey("pendulum", 1),
    digest="sha256:" + "ef" * 32,
    output_size=2,
    output_labels=("angle", "speed"),
)
"""Features whose outputs can be fed back."""
ATTENTIVE = replace(
    FEATURES,
    key=ModelKey("captions", 1),
    digest="sha256:" + "12" * 32,
    description="attends over rows of three numbers",
    layers=(
        LayerInfo("lstm", 4, 2, traced=(("i", 4), ("c", 4), ("h", 2))),
        LayerInfo("gru", 3, 0, traced=(("z", 3), ("h", 3))),
    ),
    memory_row_size=3,
    memory_rows_max=5,
)
"""Features in, and a memory."""
BOTHWAYS = replace(
    FEATURES,
    key=ModelKey("tagger", 1),
    digest="sha256:" + "34" * 32,
    description="runs from the end as well",
    layers=(
        LayerInfo("lstm", 4, 0),
        LayerInfo("gru", 4, 0, (("direction", "bidirectional"),)),
        LayerInfo("rnn", 4, 0, (("direction", "reverse"),)),
    ),
    streamable=False,
)
"""Cannot be stepped."""
