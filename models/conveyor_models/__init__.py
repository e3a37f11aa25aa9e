"""Recurrent models: their cells, the network around them, and the bundles they are shipped in."""

from conveyor_models.bundle import Bundle, digest_of, load_bundle, load_spec, save_bundle
from conveyor_models.cells import LstmCarry, LstmWeights, lstm_cell
from conveyor_models.errors import (
    BundleError,
    BundleFileError,
    RepositoryError,
    SpecError,
    UnsupportedModuleError,
    WeightsError,
)
from conveyor_models.from_torch import weights_from_torch
from conveyor_models.network import Carry, Network
from conveyor_models.repository import FoundBundle, RepositoryListing, scan
from conveyor_models.spec import LstmLayer, ModelSpec, parse_spec

__all__ = [
    "Bundle",
    "BundleError",
    "BundleFileError",
    "Carry",
    "FoundBundle",
    "LstmCarry",
    "LstmLayer",
    "LstmWeights",
    "ModelSpec",
    "Network",
    "RepositoryError",
    "RepositoryListing",
    "SpecError",
    "UnsupportedModuleError",
    "WeightsError",
    "digest_of",
    "load_bundle",
    "load_spec",
    "lstm_cell",
    "parse_spec",
    "save_bundle",
    "scan",
    "weights_from_torch",
]
