"""One node of an ONNX graph, and the bounds on what following it may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from conveyor_models.errors import UnsupportedModuleError
from conveyor_models.importers.common import refused
from conveyor_models.importers.onnx_values import (
    LENGTHS_MAX,
    Value,
    axis_number,
    integers,
)
from conveyor_models.spec import WEIGHT_VALUES_MAX

PRODUCTS_MAX: Final = 2**36
"""Multiplications for all the maps of a graph that are folded into one another."""
VALUES_LEAST: Final = 2**22
"""Numbers that a graph may always compute while it is followed."""
VALUES_TIMES: Final = 4
"""For each number that the file holds, those that may be computed beyond that."""


@dataclass(slots=True)
class Budget:
    """What may be computed for one graph: a small file could ask for a lot."""

    values_max: int
    values: int = 0
    products: int = 0

    @classmethod
    def of_file(cls, held: int) -> Budget:
        """For a file that holds so many numbers."""
        return cls(VALUES_LEAST + VALUES_TIMES * held)


@dataclass(frozen=True, slots=True)
class Node:
    """One node, with its attributes as Python values."""

    name: str
    op: str
    attributes: Mapping[str, Any]
    outputs: tuple[str, ...]
    opset: int
    budget: Budget

    def axis(self, rank: int, default: int = 0) -> int:
        """Its attribute `axis`, counted from 0."""
        return axis_number(self.name, int(self.attributes.get("axis", default)), rank)

    def refused(self, why: str) -> UnsupportedModuleError:
        """The error that says so."""
        return refused(self.name, f"{self.op}: {why}")

    def bounded(self, shape: Sequence[int]) -> None:
        """Refuses an array that is larger than any weight may be, before it is made."""
        large = len(shape) > LENGTHS_MAX or math.prod(shape) > WEIGHT_VALUES_MAX
        if large or any(each < 0 for each in shape):
            raise refused(
                self.name,
                f"makes an array of shape {list(shape)[:8]}, expected at most {WEIGHT_VALUES_MAX}"
                " numbers",
            )

    def spend(self, shape: Sequence[int]) -> None:
        """Takes an array that is computed from the graph's budget, before it is made."""
        self.bounded(shape)
        self.budget.values += math.prod(shape)
        if self.budget.values > self.budget.values_max:
            raise refused(
                self.name,
                f"the graph computes more than {self.budget.values_max} numbers from its constants,"
                f" expected at most {VALUES_TIMES} for each that the file holds and {VALUES_LEAST}",
            )

    def multiply(self, products: int) -> None:
        """Takes multiplications from the graph's budget."""
        self.budget.products += products
        if self.budget.products > PRODUCTS_MAX:
            raise refused(
                self.name,
                "the linear maps before it take too much to be folded, expected at most"
                f" {PRODUCTS_MAX} multiplications",
            )


Inputs: TypeAlias = Sequence[Value | None]
Operator: TypeAlias = Callable[[Node, Inputs], list[Value]]


def at(inputs: Inputs, place: int) -> Value | None:
    """An optional input."""
    return inputs[place] if place < len(inputs) else None


def first(node: Node, inputs: Inputs) -> Value:
    """The input that has to be there."""
    value = at(inputs, 0)
    if value is None:
        raise node.refused("has no input")
    return value


def axes_of(node: Node, inputs: Inputs) -> list[int] | None:
    """Its axes: an attribute before opset 13, then an input."""
    if "axes" in node.attributes:
        return [int(each) for each in node.attributes["axes"]]
    given = at(inputs, 1)
    return None if given is None else integers(node.name, "axes", given)


def split_sizes(node: Node, inputs: Inputs, whole: int | None) -> list[int]:
    """Lengths of the parts of a Split, of an axis of length `whole`."""
    sizes = node.attributes.get("split")
    if at(inputs, 1) is not None:
        sizes = integers(node.name, "split", at(inputs, 1))
    if whole is None:
        raise node.refused("along an axis whose length the file does not state")
    if sizes is None:
        each = -(-whole // len(node.outputs))
        sizes = [each] * (len(node.outputs) - 1)
        sizes.append(whole - sum(sizes))
    sizes = [int(each) for each in sizes]
    if len(sizes) != len(node.outputs) or sum(sizes) != whole or min(sizes) < 0:
        raise node.refused(f"into {sizes[:8]}, of {whole}")
    return sizes
