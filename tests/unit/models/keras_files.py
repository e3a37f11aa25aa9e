"""Run by itself: Keras 3, on torch, writes models, what they read and what they answer.

``python keras_files.py FOLDER [NAME ...]`` writes NAME.keras, NAME.h5 and NAME.npz for each model,
or those of the names, and without names also files that an importer has to refuse. A process
of its own keeps Keras's settings and warnings away from the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

L = keras.layers


def sequential(*layers: Any, features: int | None = 3) -> Any:
    shape = (None,) if features is None else (None, features)
    return keras.Sequential([keras.Input(shape), *layers])


def functional() -> Any:
    x = keras.Input((None, 3))
    y = L.GRU(4, return_sequences=True, name="low")(x)
    y = L.Dropout(0.5)(y)
    y = L.LSTM(5, return_sequences=True, dropout=0.3, recurrent_dropout=0.2)(y)
    y = L.Dense(2, name="top")(y)
    return keras.Model(x, L.Softmax()(y))


def branches() -> Any:
    x = keras.Input((None, 3))
    low = L.GRU(4, return_sequences=True)(x)
    return keras.Model(x, L.Add(name="sum")([low, L.GRU(4, return_sequences=True)(low)]))


def skips() -> Any:
    x = keras.Input((None, 4))
    L.GRU(4, return_sequences=True, name="aside")
    low = L.GRU(4, return_sequences=True)(x)
    aside = L.GRU(4, return_sequences=True, name="aside")(x)
    return keras.Model(x, [low, aside])


S = {"return_sequences": True}
MODELS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: sequential(L.LSTM(5, **S)),
    "lstm_of_one": lambda: sequential(L.LSTM(1, **S), features=1),
    "lstm_17": lambda: sequential(L.LSTM(17, unit_forget_bias=False, stateful=False, **S)),
    "lstm_without_bias": lambda: sequential(L.LSTM(5, use_bias=False, **S)),
    "lstm_hard": lambda: sequential(L.LSTM(5, recurrent_activation="hard_sigmoid", **S)),
    "gru": lambda: sequential(L.GRU(5, **S)),
    "gru_before": lambda: sequential(L.GRU(5, reset_after=False, **S)),
    "gru_hard": lambda: sequential(L.GRU(3, recurrent_activation="hard_sigmoid", **S)),
    "gru_without_bias": lambda: sequential(L.GRU(5, use_bias=False, **S)),
    "gru_before_without_bias": lambda: sequential(L.GRU(5, use_bias=False, reset_after=False, **S)),
    "rnn": lambda: sequential(L.SimpleRNN(5, **S)),
    "rnn_relu": lambda: sequential(L.SimpleRNN(5, activation="relu", **S)),
    "both_lstm": lambda: sequential(
        L.Bidirectional(L.LSTM(3, **S)), L.Bidirectional(L.LSTM(2, **S), name="upper")
    ),
    "both_gru": lambda: sequential(
        L.Bidirectional(L.GRU(3, **S), backward_layer=L.GRU(3, go_backwards=True, **S))
    ),
    "both_rnn": lambda: sequential(L.Bidirectional(L.SimpleRNN(3, **S))),
    "words": lambda: sequential(
        L.Embedding(11, 4, name="table"),
        L.SpatialDropout1D(0.2),
        L.GRU(6, **S),
        L.GRU(5, name="second", **S),
        L.TimeDistributed(L.Dense(7, activation="softmax")),
        features=None,
    ),
    "head": lambda: sequential(L.LSTM(5, **S), L.Dense(2, use_bias=False, activation="sigmoid")),
    "logs": lambda: sequential(L.GRU(5, **S), L.Dense(4), L.Activation("log_softmax")),
    "functional": functional,
    "last": lambda: sequential(L.GRU(4, **S), L.LSTM(5), L.Dense(2)),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "masking": lambda: sequential(L.Masking(0.0, name="mask"), L.LSTM(3)),
    "mask_zero": lambda: sequential(
        L.Embedding(5, 3, mask_zero=True, name="table"), L.LSTM(3), features=None
    ),
    "activation": lambda: sequential(L.LSTM(3, activation="relu", name="odd")),
    "gate": lambda: sequential(L.GRU(3, recurrent_activation="relu", name="odd")),
    "rnn_gate": lambda: sequential(L.SimpleRNN(3, activation="elu", name="odd")),
    "merge": lambda: sequential(L.Bidirectional(L.GRU(3, **S), merge_mode="sum", name="odd")),
    "backwards": lambda: sequential(L.GRU(3, go_backwards=True, name="odd", **S)),
    "both_last": lambda: sequential(L.Bidirectional(L.GRU(3), name="odd")),
    "convolution": lambda: sequential(L.Conv1D(3, 2, name="odd"), L.GRU(3)),
    "norm": lambda: sequential(L.GRU(3, **S), L.LayerNormalization(name="odd")),
    "before": lambda: sequential(L.Dense(3, name="odd"), L.GRU(3)),
    "twice": lambda: sequential(L.GRU(3, **S), L.Dense(3), L.Dense(2, name="odd")),
    "head_activation": lambda: sequential(L.GRU(3, **S), L.Dense(3, activation="relu", name="odd")),
    "half": lambda: sequential(L.GRU(3, dtype="mixed_float16", name="odd", **S)),
    "branches": branches,
    "two_outputs": skips,
    "no_recurrence": lambda: sequential(L.Dropout(0.1)),
}


def main(folder: Path, names: list[str]) -> None:
    for name in names or MODELS:
        keras.utils.clear_session()
        keras.utils.set_random_seed(len(name))
        model = MODELS[name]()
        rng = np.random.default_rng(len(name))
        model.set_weights([rng.normal(0, 0.6, each.shape) for each in model.get_weights()])
        tokens = name == "words"
        shape = (2, 25) if tokens else (2, 25, model.input_shape[-1])
        x = rng.integers(0, 11, shape) if tokens else rng.normal(0, 1, shape).astype("float32")
        y = keras.ops.convert_to_numpy(model(x, training=False))
        np.savez(folder / f"{name}.npz", x=x, y=y)
        model.save(folder / f"{name}.keras")
        model.save(folder / f"{name}.h5")
    if not names:
        write_refused(folder)


def write_refused(folder: Path) -> None:
    for name, make in REFUSED.items():
        keras.utils.clear_session()
        model = make()
        model.save(folder / f"refused_{name}.keras")
        model.save(folder / f"refused_{name}.h5")
    model = sequential(L.LSTM(2))
    model.save_weights(folder / "only.weights.h5")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
