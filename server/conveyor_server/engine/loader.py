"""From a folder of bundles to runnable models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from conveyor_models import Bundle, BundleError, ModelSpec, load_bundle, scan
from conveyor_models.repository import FoundBundle
from conveyor_server.config import LimitsConfig
from conveyor_server.core import (
    ELEMENT_BYTES,
    InputKind,
    LayerInfo,
    LimitSource,
    ModelInfo,
    ModelKey,
)
from conveyor_server.engine.engine import Runner, SameBitsError, TorchEngine
from conveyor_server.errors import ConveyorError

Fingerprint: TypeAlias = tuple[tuple[int, int, int], ...]
"""See `FoundBundle.fingerprint`."""
RECORD_BYTES_MAX: Final = 2**10
"""What a snapshot takes beside the carry and the memory, rounded up."""


@dataclass(frozen=True, slots=True)
class Known:
    """A version that is loaded already."""

    digest: str
    fingerprint: Fingerprint | None
    """Of its files when they were last read and were those that are loaded; None: read again."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to be put into service."""

    info: ModelInfo
    runner: Runner


@dataclass(slots=True)
class Repository:
    """What a look through the repository found.

    Attributes:
        loaded: Versions that were not known before.
        present: All versions that are there, those loaded before as they were then.
        problems: A sentence for each bundle that cannot be served.
        fingerprints: Of each version in `present`, for the next look.
    """

    loaded: list[Loaded] = field(default_factory=list[Loaded])
    present: set[ModelKey] = field(default_factory=set[ModelKey])
    problems: list[str] = field(default_factory=list[str])
    fingerprints: dict[ModelKey, Fingerprint] = field(default_factory=dict[ModelKey, Fingerprint])


def load_repository(
    folder: Path, engine: TorchEngine, known: Mapping[ModelKey, Known], limits: LimitsConfig
) -> Repository:
    """Loads every bundle that is not known yet. Takes a while; may be called from any thread.

    The weights of known bundles are read only where their files have changed.

    Args:
        folder: The repository.
        engine: Prepares the models; they are added to it by the caller.
        known: Each version already loaded, in service or not. Weights are not swapped under a
            version's sessions: a changed bundle needs a new version, and is a problem until it has
            one.
        limits: For bundles that set none of their own.

    Raises:
        BundleError: The folder itself cannot be read.
    """
    listing = scan(folder)
    found = Repository(problems=[str(problem) for problem in listing.problems])
    for each in listing.bundles:
        try:
            _load(each, engine, known, limits, found)
        except (BundleError, SameBitsError) as error:
            found.problems.append(str(error))
        except (RuntimeError, MemoryError, ConveyorError) as error:  # out of memory for instance
            found.problems.append(f"{each.path}: cannot be loaded: {error}")
    return found


def _load(
    each: FoundBundle,
    engine: TorchEngine,
    known: Mapping[ModelKey, Known],
    limits: LimitsConfig,
    found: Repository,
) -> None:
    key = ModelKey(each.spec.name, each.spec.version)
    before = known.get(key)
    if before is None or before.fingerprint != each.fingerprint:
        bundle = load_bundle(each.path)
        key = ModelKey(bundle.spec.name, bundle.spec.version)
        before = known.get(key)
        if before is None:
            found.loaded.append(Loaded(describe(bundle, limits), engine.prepare(bundle)))
        elif before.digest != bundle.digest:
            found.problems.append(
                f"{key.name} version {key.version}: changed since it was loaded;"
                " give it a new version"
            )
            return
    found.present.add(key)
    found.fingerprints[key] = each.fingerprint


def describe(bundle: Bundle, limits: LimitsConfig) -> ModelInfo:
    """What the rooms above the engine know of a model."""
    spec = bundle.spec
    rows_max, rows_limit = _memory_rows_max(spec, limits)
    return ModelInfo(
        key=ModelKey(spec.name, spec.version),
        digest=bundle.digest,
        description=spec.description,
        input_kind=InputKind(spec.input.kind),
        input_size=spec.input_size,
        vocabulary_size=spec.vocabulary_size or 0,
        output_size=spec.output_size,
        activation=spec.output.activation,
        input_labels=spec.input.labels or (),
        output_labels=spec.output.labels or (),
        embedding_size=0 if spec.embedding is None else spec.embedding.size,
        layers=_layers(spec),
        carry_bytes=spec.carry_values * ELEMENT_BYTES,
        parameters=spec.weight_values,
        step_multiply_adds=spec.step_multiply_adds,
        chunk_steps_max=spec.limits.chunk_steps_max or limits.chunk_steps_max,
        streamable=spec.streamable,
        memory_row_size=0 if spec.attention is None else spec.attention.memory_size,
        memory_rows_max=rows_max,
        memory_rows_limit=rows_limit,
    )


def _memory_rows_max(spec: ModelSpec, limits: LimitsConfig) -> tuple[int, LimitSource]:
    """So many that a snapshot, which holds the carry too, can be imported in one message.

    Returns them with the setting that allows no more.
    """
    server = limits.memory_rows_max
    if spec.attention is None:
        return 0, LimitSource("limits.memory_rows_max")
    beside = spec.carry_values * ELEMENT_BYTES + RECORD_BYTES_MAX
    row_bytes = spec.attention.memory_size * ELEMENT_BYTES
    fitting = max(0, limits.message_bytes_max - beside) // row_bytes
    own = spec.limits.memory_rows_max or server
    if fitting < min(server, own):
        return fitting, LimitSource("limits.message_bytes_max", limits.message_bytes_max)
    return min(server, own), LimitSource(
        "limits.memory_rows_max", model=spec.name if own < server else ""
    )


def _layers(spec: ModelSpec) -> tuple[LayerInfo, ...]:
    return tuple(
        LayerInfo(
            layer.cell,
            layer.size,
            layer.projection_size,
            tuple(layer.options.items()),
            tuple(
                (name, layer.hidden_size if name == "h" else layer.size) for name in layer.traced
            ),
        )
        for layer in spec.layers
    )
