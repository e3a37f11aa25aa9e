"""What a Slice takes of an axis, where its length may only be known when the graph runs."""

from __future__ import annotations

from conveyor_models.importers.onnx_node import Inputs, Node, at
from conveyor_models.importers.onnx_shapes import ENDLESS, ONE, Length
from conveyor_models.importers.onnx_values import integers, lengths_of

Range = tuple[int, Length, Length, int]
"""Axis, start, end and step of a Slice."""


def slice_ranges(node: Node, inputs: Inputs) -> list[Range]:
    """What a Slice takes of each axis that is cut."""
    if "starts" in node.attributes:
        starts = [Length.of(int(each)) for each in node.attributes["starts"]]
        ends = [Length.of(int(each)) for each in node.attributes["ends"]]
        axes, steps = node.attributes.get("axes"), None
    else:
        starts = list(lengths_of(node.name, "starts", at(inputs, 1)))
        ends = list(lengths_of(node.name, "ends", at(inputs, 2)))
        given = at(inputs, 3), at(inputs, 4)
        axes = None if given[0] is None else integers(node.name, "axes", given[0])
        steps = None if given[1] is None else integers(node.name, "steps", given[1])
    axes = list(range(len(starts))) if axes is None else [int(each) for each in axes]
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise node.refused("its starts, ends, axes and steps do not fit")
    return list(zip(axes, starts, ends, steps, strict=True))


def whole_range(length: Length, start: Length, end: Length, step: int) -> bool:
    """Whether a range is all of an axis, in its order."""
    return step == 1 and start == Length.of(0) and _reaches(length, end)


def backward_range(length: Length, start: Length, end: Length, step: int) -> bool:
    """Whether a range is all of an axis, from its end."""
    last = length.minus(ONE)
    begins = start in (Length.of(-1), last) or (start.known or 0) >= ENDLESS
    size = length.known
    if size is not None and start.known is not None:
        begins = begins or start.known >= size - 1
    before = -ENDLESS if size is None else -size - 1
    return step == -1 and begins and end.known is not None and end.known <= before


def last_range(length: Length, start: Length, end: Length, step: int) -> bool:
    """Whether a range is the last entry of an axis."""
    begins = start in (Length.of(-1), length.minus(ONE))
    return step >= 1 and begins and _reaches(length, end)


def _reaches(length: Length, end: Length) -> bool:
    if end.known is not None and length.known is not None:
        return end.known >= length.known
    return end == length or (end.known is not None and end.known >= ENDLESS)


def plain_range(node: Node, start: Length, end: Length, step: int) -> slice:
    """The range of an axis whose ends are numbers."""
    if start.known is None or end.known is None:
        raise node.refused("its starts and ends are not constants")
    return slice(start.known, end.known, step)
