"""Run by itself: Keras 3, on torch, writes models, what they read and what they answer.

``python keras_files.py FOLDER [NAME ...]`` writes NAME.keras, NAME.h5 and NAME.npz for each model,
or those of the names, and without names also files that an importer has to refuse, and models as
Keras 2 would have written them. A process of its own keeps Keras's settings and warnings away from
the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import keras_2_files
import numpy as np

L = keras.layers
S = {"return_sequences": True}


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


def heads(activation: str = "linear") -> Any:
    x = keras.Input((None, 3))
    y = L.LSTM(5, **S)(x)
    mean = L.Dense(2, name="mean", activation=activation)(y)
    value = L.TimeDistributed(L.Dense(1, use_bias=False, activation=activation), name="value")(
        L.Dense(3)(y)
    )
    return keras.Model(x, [value, mean, y] if activation == "linear" else [value, mean])


def joined_heads() -> Any:
    x = keras.Input((None, 3))
    y = L.Dropout(0.1)(L.GRU(5, **S)(x))
    return keras.Model(x, L.Softmax()(L.Concatenate()([L.Dense(2)(y), y, L.Dense(3)(y)])))


def flips(slices: bool) -> Any:
    def flip(rows: Any) -> Any:
        return rows[:, ::-1] if slices else keras.ops.flip(rows, axis=1)

    x = keras.Input((None, 3))
    y = L.LSTM(4, go_backwards=True, **S)(x)
    y = L.GRU(3, **S)(y)  # still backwards
    y = flip(y)
    y = L.SimpleRNN(4, **S)(y)
    y = flip(L.GRU(4, **S)(flip(y)))
    return keras.Model(x, L.Dense(2)(y))


def backwards_twice() -> Any:
    x = keras.Input((None, 3))
    return keras.Model(x, L.LSTM(4, go_backwards=True, **S)(L.LSTM(4, go_backwards=True, **S)(x)))


def two_directions() -> Any:
    x = keras.Input((None, 3))
    y = L.Dense(4)(x)
    forward = L.LSTM(4, **S)(y)
    backward = L.LSTM(4, go_backwards=True, **S)(y)
    y = L.Concatenate()([forward, keras.ops.flip(backward, axis=1)])
    return keras.Model(x, L.Dense(2)(y))


def sliced(index: int) -> Any:
    x = keras.Input((None, 3))
    return keras.Model(x, L.Dense(2)(L.LSTM(5, **S)(x)[:, index]))


def states() -> Any:
    x = keras.Input((None, 3))
    y, _, _ = L.LSTM(4, return_state=True, **S)(x)
    return keras.Model(x, L.Dense(2)(y))


def encoder_decoder() -> Any:
    x = keras.Input((None, 3))
    _, h, c = L.LSTM(4, return_state=True, name="encoder", **S)(x)
    return keras.Model(x, L.LSTM(4, name="decoder", **S)(x, initial_state=[h, c]))


def state_outputs() -> Any:
    x = keras.Input((None, 3))
    return keras.Model(x, L.LSTM(4, return_state=True, name="odd", **S)(x))


def shared() -> Any:
    x = keras.Input((None, 4))
    twice = L.GRU(4, name="odd", **S)
    return keras.Model(x, twice(twice(x)))


def two_inputs() -> Any:
    x, y = keras.Input((None, 3)), keras.Input((None, 3))
    return keras.Model([x, y], L.GRU(4, **S)(L.Concatenate()([x, y])))


def uneven_heads() -> Any:
    x = keras.Input((None, 3))
    y = L.GRU(4, **S)(x)
    return keras.Model(x, [L.Dense(2, name="a")(y), L.Dense(2, activation="sigmoid", name="b")(y)])


def soft_heads() -> Any:
    x = keras.Input((None, 3))
    y = L.GRU(4, **S)(x)
    return keras.Model(x, [L.Dense(2, activation="softmax", name=name)(y) for name in "ab"])


def training() -> Any:
    x = keras.Input((None, 3))
    return keras.Model(x, L.GRU(4, **S)(L.Dropout(0.5, name="odd")(x, training=True)))


def far_mean() -> Any:
    return sequential(
        L.Normalization(mean=[1.0, 1e5, 0.0], variance=[1.0, 1.0, 0.0], name="odd"), L.LSTM(3)
    )


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
    "stateful": lambda: keras.Sequential(
        [keras.Input(batch_shape=(2, 25, 3)), L.LSTM(4, stateful=True, **S)]
    ),
    "dense_before": lambda: sequential(L.Dense(6), L.Dense(4, use_bias=False), L.LSTM(5, **S)),
    "dense_between": lambda: sequential(
        L.GRU(5, **S),
        L.Dense(4),
        L.Activation("linear"),
        L.Bidirectional(L.LSTM(3, **S)),
        L.TimeDistributed(L.Dropout(0.1)),
        L.TimeDistributed(L.Dense(5)),
        L.Dense(3, use_bias=False, activation="softmax"),
    ),
    "normalized": lambda: sequential(
        L.Rescaling(0.5, offset=[0.1, 0.2, -0.3]),
        L.Normalization(name="adapted"),
        L.Normalization(mean=[0.5, -1.0, 2.0], variance=[1.0, 4.0, 0.25]),
        L.Normalization(axis=None, mean=0.5, variance=2.0),
        L.GRU(5, reset_after=False, **S),
        L.BatchNormalization(),
        L.LSTM(4, **S),
        L.BatchNormalization(scale=False),
        L.TimeDistributed(L.BatchNormalization(center=False)),
        L.Dense(3),
        L.Normalization(mean=[0.5, -1.0, 2.0], variance=[1.0, 4.0, 0.25], invert=True),
        L.Activation("sigmoid"),
    ),
    "norm_on_top": lambda: sequential(L.SimpleRNN(4, **S), L.BatchNormalization()),
    "words_dense": lambda: sequential(
        L.Embedding(11, 4), L.Dense(5), L.BatchNormalization(), L.GRU(6, **S), features=None
    ),
    "heads": heads,
    "heads_sigmoid": lambda: heads("sigmoid"),
    "heads_joined": joined_heads,
    "flips": lambda: flips(False),
    "flips_sliced": lambda: flips(True),
    "backwards_twice": backwards_twice,
    "two_directions": two_directions,
    "states": states,
    "slice_last": lambda: sliced(-1),
    "slice_first": lambda: sliced(0),
    "last_backwards": lambda: sequential(L.GRU(4, go_backwards=True), L.Dense(2)),
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
    "before": lambda: sequential(L.Dense(3, activation="relu", name="odd"), L.GRU(3)),
    "gates_before": lambda: sequential(L.Dense(3, activation="sigmoid", name="odd"), L.GRU(3)),
    "between": lambda: sequential(
        L.GRU(3, **S), L.Dense(3, activation="softmax", name="odd"), L.GRU(3)
    ),
    "twice": lambda: sequential(
        L.GRU(3, **S), L.Dense(3, activation="tanh", name="odd"), L.Dense(2)
    ),
    "activation_layer": lambda: sequential(L.GRU(3, **S), L.ReLU(name="odd")),
    "nested": lambda: sequential(keras.Sequential([L.GRU(3, **S)], name="odd")),
    "flatten": lambda: keras.Sequential(
        [keras.Input((5, 3)), L.GRU(3, **S), L.Flatten(name="odd"), L.Dense(2)]
    ),
    "encoder_decoder": encoder_decoder,
    "state_outputs": state_outputs,
    "shared": shared,
    "two_inputs": two_inputs,
    "uneven_heads": uneven_heads,
    "soft_heads": soft_heads,
    "training": training,
    "far_mean": far_mean,
    "other_axis": lambda: keras.Sequential(
        [keras.Input((5, 3)), L.BatchNormalization(axis=1, name="odd"), L.GRU(3)]
    ),
    "head_activation": lambda: sequential(L.GRU(3, **S), L.Dense(3, activation="relu", name="odd")),
    "half": lambda: sequential(L.GRU(3, dtype="mixed_float16", name="odd", **S)),
    "branches": branches,
    "two_outputs": skips,
    "no_recurrence": lambda: sequential(L.Dropout(0.1)),
}


def fill(model: Any, rng: Any) -> None:
    """Weights of a size at which every gate matters."""
    for each in model.variables:
        if "seed" not in each.path and "count" not in each.path:
            values = rng.normal(0, 0.6, each.shape)
            each.assign(abs(values) + 0.2 if "variance" in each.path else values)
    for layer in model.layers:
        if layer.name == "adapted":
            layer.finalize_state()  # what it computes with, from its weights


def answer(model: Any, x: Any) -> Any:
    """What Keras makes of it, several outputs side by side."""
    y = model(x, training=False)
    rows = [keras.ops.convert_to_numpy(each) for each in (y if isinstance(y, list) else [y])]
    return np.concatenate(rows, axis=-1)


def main(folder: Path, names: list[str]) -> None:
    for name in names or MODELS:
        keras.utils.clear_session()
        keras.utils.set_random_seed(len(name))
        model = MODELS[name]()
        rng = np.random.default_rng(len(name))
        fill(model, rng)
        tokens = name.startswith("words")
        shape = (2, 25) if tokens else (2, 25, model.input_shape[-1])
        x = rng.integers(0, 11, shape) if tokens else rng.normal(0, 1, shape).astype("float32")
        judge = model
        if name == "flips_sliced":  # torch has no slices with a step below 0
            judge = flips(False)
            judge.set_weights(model.get_weights())
        np.savez(folder / f"{name}.npz", x=x, y=answer(judge, x))
        model.save(folder / f"{name}.keras")
        model.save(folder / f"{name}.h5")
    if not names:
        write_refused(folder)
        write_keras_2(folder)


def write_refused(folder: Path) -> None:
    for name, make in REFUSED.items():
        keras.utils.clear_session()
        model = make()
        model.save(folder / f"refused_{name}.keras")
        model.save(folder / f"refused_{name}.h5")
    model = sequential(L.LSTM(2))
    model.save_weights(folder / "only.weights.h5")


def hard_sigmoid_2(x: Any) -> Any:
    """As Keras 2 has it."""
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


KERAS_2: dict[str, Callable[[], Any]] = {
    "plain": lambda: sequential(L.LSTM(5, **S), L.GRU(4, **S), L.Dense(2, activation="softmax")),
    "hard": lambda: sequential(
        L.LSTM(5, recurrent_activation=hard_sigmoid_2, **S),
        L.GRU(4, reset_after=False, recurrent_activation=hard_sigmoid_2, **S),
    ),
    "words": lambda: sequential(
        L.Embedding(11, 4),
        L.Bidirectional(L.GRU(3, **S)),
        L.Bidirectional(L.LSTM(3, **S)),
        L.TimeDistributed(L.Dense(7)),
        features=None,
    ),
    "normalized": lambda: sequential(
        L.BatchNormalization(),
        L.LSTM(4, **S),
        L.BatchNormalization(),
        L.LSTM(4, **S),
        L.Dropout(0.1),
        L.LSTM(4, **S),
        L.Dense(3),
        L.Dense(2),
    ),
    "functional": functional,
    "heads": heads,
    "cudnn": lambda: sequential(
        L.LSTM(5, name="cudnn_lstm", **S),
        L.Bidirectional(L.LSTM(2, **S), name="cudnn_both"),
        L.GRU(3, name="cudnn_gru", **S),
        L.Dense(2),
    ),
}


def write_keras_2(folder: Path) -> None:
    for name, make in KERAS_2.items():
        keras.utils.clear_session()
        model = make()
        rng = np.random.default_rng(len(name))
        fill(model, rng)
        tokens = name == "words"
        x = rng.integers(0, 11, (2, 25)) if tokens else rng.normal(0, 1, (2, 25, 3))
        x = x.astype("int32" if tokens else "float32")
        np.savez(folder / f"old_{name}.npz", x=x, y=answer(model, x))
        keras_2_files.write(model, folder / f"old_{name}.h5")
        keras_2_files.write(model, folder / f"old_{name}.keras")
        keras_2_files.write_weights(model, folder / f"old_{name}_only.h5")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
