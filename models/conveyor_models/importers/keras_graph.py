"""Which layer of a Keras model reads what.

The structure is JSON that somebody else wrote. Both Keras 3 and Keras 2 list the layers from the
inputs on; they differ in how a layer names those it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from conveyor_models.importers.common import refused
from conveyor_models.spec import LAYERS_MAX

LAYERS_READ_MAX: Final = 4 * LAYERS_MAX
_SOURCES_MAX: Final = LAYERS_READ_MAX


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A layer and what it reads."""

    name: str
    kind: str
    """Its class."""
    config: Mapping[str, Any]
    table: Mapping[str, Any]
    """All that the file says of it."""
    sources: tuple[str, ...]
    """The layers whose rows it reads."""
    arguments: tuple[object, ...] = ()
    """What it is called with beside rows: the indices of a slice."""


def calls_of(config: Mapping[str, Any]) -> tuple[list[Call], list[str]]:
    """The layers in the order of the file, and those whose rows the model puts out.

    Raises:
        UnsupportedModuleError: it is no Sequential or Functional model, or a layer is called in a
            way that a bundle cannot express.
    """
    kind, inner = config.get("class_name"), config.get("config")
    if kind not in ("Sequential", "Functional", "Model"):
        raise refused(str(kind), "expected a Sequential or a Functional model")
    if isinstance(inner, list):  # as Keras wrote Sequential models before 2.2.3
        inner = {"layers": cast("object", inner)}
    if not isinstance(inner, dict):
        raise refused(str(kind), "has no structure")
    whole = cast("dict[str, Any]", inner)
    tables = _tables(str(kind), whole.get("layers"))
    if kind == "Sequential":
        return _sequence(whole, tables)
    calls = [_call(table) for table in tables]
    outputs = [_tensor(each) for each in _places(whole.get("output_layers"))]
    if not outputs:
        raise refused("model", "has no output")
    return calls, outputs


def name_of(table: Mapping[str, Any]) -> str:
    """What the file calls a layer."""
    return str(table["config"].get("name", table.get("class_name", "layer")))


def _tables(kind: str, given: object) -> list[dict[str, Any]]:
    if not isinstance(given, list) or len(cast("list[object]", given)) > LAYERS_READ_MAX:
        raise refused(kind, f"expected at most {LAYERS_READ_MAX} layers")
    for each in cast("list[object]", given):
        if not isinstance(each, dict) or not isinstance(
            cast("dict[str, Any]", each).get("config"), dict | list
        ):
            raise refused(kind, "a layer without a structure")
        if isinstance(cast("dict[str, Any]", each)["config"], list):
            raise refused(kind, "a model within the model")
    return cast("list[dict[str, Any]]", given)


def _sequence(
    whole: Mapping[str, Any], tables: list[dict[str, Any]]
) -> tuple[list[Call], list[str]]:
    if not tables:
        raise refused("model", "has no layers")
    calls: list[Call] = []
    if tables[0].get("class_name") != "InputLayer":
        built = cast("dict[str, Any]", tables[0].get("build_config") or {})
        shape = (
            tables[0]["config"].get("batch_input_shape")
            or whole.get("build_input_shape")
            or built.get("input_shape")
        )
        config = {"name": "input", "batch_shape": shape}
        calls.append(Call("input", "InputLayer", config, {}, ()))
    for table in tables:
        sources = (calls[-1].name,) if calls else ()
        calls.append(
            Call(name_of(table), str(table.get("class_name")), table["config"], table, sources)
        )
    return calls, [calls[-1].name]


def _call(table: Mapping[str, Any]) -> Call:
    name, kind = name_of(table), str(table.get("class_name"))
    nodes: object = table.get("inbound_nodes", [])
    if not isinstance(nodes, list):
        raise refused(name, "what it reads is not stated")
    given = cast("list[Any]", nodes)
    if len(given) > 1:
        raise refused(name, "is used more than once")
    if not given:
        return Call(name, kind, table["config"], table, ())
    if isinstance(given[0], dict):
        sources, arguments = _read_3(name, cast("dict[str, Any]", given[0]))
    else:
        sources, arguments = _read_2(name, given[0]), ()
    return Call(name, kind, table["config"], table, sources, arguments)


def _read_3(name: str, node: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[object, ...]]:
    """Of Keras 3: the arguments of the call, with a dictionary for each tensor."""
    _check_keywords(name, node.get("kwargs"))
    given: object = node.get("args", [])
    if not isinstance(given, list):
        raise refused(name, "what it reads is not stated")
    arguments = cast("list[object]", given)
    sources = tuple(_tensor(each) for each in _histories(arguments[:1]))
    if _histories(arguments[1:]):
        raise refused(name, "reads more than one tensor")
    return sources, tuple(arguments[1:])


def _read_2(name: str, node: object) -> tuple[str, ...]:
    """Of Keras 2: [layer, node, tensor, keywords] for each tensor."""
    if not isinstance(node, list):
        raise refused(name, "what it reads is not stated")
    places = _places(cast("object", node))
    for place in places:
        if len(place) > 3:
            _check_keywords(name, place[3])
    return tuple(_tensor(place) for place in places)


def _check_keywords(name: str, given: object) -> None:
    for key, value in cast("dict[str, Any]", given or {}).items():
        if value is not None and not (key == "training" and value is False):
            said = " from the model itself" if isinstance(value, dict | list) else f"={value}"
            raise refused(name, f"is called with {key}{said}, which a bundle cannot express")


def _places(value: object) -> list[list[Any]]:
    """[layer, node, tensor] of each tensor, where there is one or a list of them."""
    if isinstance(value, dict):  # outputs by name
        value = list(cast("dict[str, object]", value).values())
    found = cast("list[Any]", value) if isinstance(value, list) else []
    if found and isinstance(found[0], str):
        found = [found]
    if len(found) > _SOURCES_MAX or not all(isinstance(each, list) for each in found):
        raise refused("model", "what goes in and out of its layers is not stated")
    return found


def _tensor(place: list[Any]) -> str:
    """The layer, if the tensor is its first output, of its first call."""
    if len(place) < 3 or not isinstance(place[0], str):
        raise refused("model", "what goes in and out of its layers is not stated")
    if place[1] != 0:
        raise refused(place[0], "is used more than once")
    if place[2] != 0:
        raise refused(place[0], "return_state: the model uses its state as well as its rows")
    return place[0]


def _histories(value: object) -> list[list[Any]]:
    """The tensors that stand anywhere in the arguments of a call."""
    if isinstance(value, list):
        return [each for item in cast("list[object]", value) for each in _histories(item)]
    if not isinstance(value, dict):
        return []
    table = cast("dict[str, Any]", value)
    if table.get("class_name") == "__keras_tensor__":
        return [list(table["config"]["keras_history"])]
    return [each for item in table.values() for each in _histories(item)]
