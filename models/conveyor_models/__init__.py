"""Recurrent models: their cells, the network around them, and the bundles they are shipped in."""

from conveyor_models.attention import AttentionWeights, Memory, attend, attention_memory
from conveyor_models.bundle import Bundle, digest_of, load_bundle, load_spec, save_bundle
from conveyor_models.cells import (
    CellWeights,
    GateFunction,
    GruWeights,
    HiddenCarry,
    LstmCarry,
    LstmWeights,
    RnnWeights,
    gru_cell,
    lstm_cell,
    rnn_cell,
)
from conveyor_models.errors import (
    AmbiguousModuleError,
    BundleError,
    BundleFileError,
    ImporterMissingError,
    ImportFileError,
    RepositoryError,
    SpecError,
    UnsupportedModuleError,
    WeightsError,
)
from conveyor_models.importers.torch_state import weights_from_torch
from conveyor_models.layers import GruLayer, Layer, LstmLayer, RecurrentLayer, RnnLayer
from conveyor_models.network import (
    Carry,
    Network,
    attention_weights,
    cell_weights,
    layer_tensors,
)
from conveyor_models.repository import FoundBundle, RepositoryListing, add_bundle, scan
from conveyor_models.spec import AttentionSpec, ModelSpec, parse_spec

__all__ = [
    "AmbiguousModuleError",
    "AttentionSpec",
    "AttentionWeights",
    "Bundle",
    "BundleError",
    "BundleFileError",
    "Carry",
    "CellWeights",
    "FoundBundle",
    "GateFunction",
    "GruLayer",
    "GruWeights",
    "HiddenCarry",
    "ImportFileError",
    "ImporterMissingError",
    "Layer",
    "LstmCarry",
    "LstmLayer",
    "LstmWeights",
    "Memory",
    "ModelSpec",
    "Network",
    "RecurrentLayer",
    "RepositoryError",
    "RepositoryListing",
    "RnnLayer",
    "RnnWeights",
    "SpecError",
    "UnsupportedModuleError",
    "WeightsError",
    "add_bundle",
    "attend",
    "attention_memory",
    "attention_weights",
    "cell_weights",
    "digest_of",
    "gru_cell",
    "layer_tensors",
    "load_bundle",
    "load_spec",
    "lstm_cell",
    "parse_spec",
    "rnn_cell",
    "save_bundle",
    "scan",
    "weights_from_torch",
]
