"""In what order the modules of a state dict stand: what shapes leave open is asked for.

A state dict names modules and not the way that rows take through them. A reading is one such way
that the sizes allow. One is taken without a question only where it is the usual one (embedding,
one recurrent module, a linear layer) and no other is possible; otherwise the options have to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import nn

from conveyor_models.errors import AmbiguousModuleError, UnsupportedModuleError
from conveyor_models.importers.common import listed, refused
from conveyor_models.importers.options import (
    NO_EMBEDDING,
    NOTHING,
    ImportOptions,
    parse_names,
)
from conveyor_models.importers.torch_parts import Parts, by_module, resolved, shown_name

MODULES_TRIED_MAX: Final = 8
"""Modules of which all orders are tried; of more, the order has to be given."""
READINGS_SHOWN_MAX: Final = 4
SIZES_SHOWN_MAX: Final = 6
DEFAULT_EPSILON: Final = "1e-05"
"""Of nn.BatchNorm1d."""
SIDE_BY_SIDE: Final = "+"
_FUNCTIONS: Final = frozenset(name.lower() for name in nn.modules.activation.__all__)
_EMBEDDING_WORDS: Final = ("emb", "lookup", "vocab", "wte", "token", "word", "char")
_NOTHINGS: Final = frozenset({"dropout", "flatten", "identity"})


@dataclass(frozen=True, slots=True)
class Reading:
    """The way that rows take through the modules."""

    embedding: str | None
    chain: tuple[str, ...]
    """Recurrent modules, linear layers and normalisations one after another."""
    heads: tuple[str, ...]
    """Linear layers at the end that all read what `chain` gives; their outputs side by side."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every module once, from the input to the output."""
        return (*(() if self.embedding is None else (self.embedding,)), *self.chain, *self.heads)

    @property
    def order(self) -> str:
        """As `--order` takes it."""
        first = [] if self.embedding is None else [shown_name(self.embedding)]
        last = [SIDE_BY_SIDE.join(shown_name(name) for name in self.heads)] if self.heads else []
        return ",".join([*first, *(shown_name(name) for name in self.chain), *last])

    def is_usual(self, parts: Parts) -> bool:
        """Whether nothing but recurrent modules stands between embedding and heads."""
        return all(name in parts.recurrent for name in self.chain)


def reading_of(parts: Parts, options: ImportOptions) -> Reading:
    """The one way that the sizes and the options allow.

    Raises:
        AmbiguousModuleError: it takes an option to say which it is.
        UnsupportedModuleError: an option names what is not there, or nothing fits.
    """
    if options.between not in (None, NOTHING):
        raise refused(
            f"--between {options.between}",
            "a bundle has no place for a function between its modules; if there is none say"
            f" --between {NOTHING}",
        )
    said = _said(parts, options)
    if len(parts.names) > MODULES_TRIED_MAX and not said.whole:
        raise AmbiguousModuleError(
            f"{listed(parts.names)}: say their order, from the input to the output, with --order",
            key=parts.names[0],
        )
    sizes = _sizes(parts)
    readings = _readings_of_order if said.whole else _readings_of_sizes
    found = list(itertools.islice(readings(parts, said, sizes), READINGS_SHOWN_MAX + 1))
    if not found:
        raise _nothing_fits(said.order if said.whole else parts.names, sizes)
    if len(found) > 1 or not _is_proven(parts, options, said, found[0]):
        raise _question(parts, options, found)
    return found[0]


def _is_proven(parts: Parts, options: ImportOptions, said: _Said, reading: Reading) -> bool:
    """Whether what a state dict cannot prove about the only reading was given."""
    if len(parts.recurrent) > 1 and not said.order:
        return False
    if len(reading.heads) > 1 and not (said.whole or said.heads):
        return False
    embedding = reading.embedding
    if embedding is not None and not (said.whole or options.embedding):
        # A linear layer that leads past the stack may have the same shape.
        name = embedding.rpartition(".")[2].lower()
        if not any(word in name for word in _EMBEDDING_WORDS):
            return False
    if reading.is_usual(parts):
        return True
    return said.whole and options.between == NOTHING and not _without_epsilon(parts, options)


def _without_epsilon(parts: Parts, options: ImportOptions) -> list[str]:
    """The normalisations of which --epsilon says nothing."""
    said = by_module("--epsilon", options.epsilon, parts.norms)
    return [name for name in parts.norms if name not in said and "" not in options.epsilon]


# --- What the options say ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Said:
    """The options, with the names of the file."""

    order: tuple[str, ...]
    """Heads side by side one by one."""
    whole: bool
    """Whether `order` names every module, not the recurrent ones alone."""
    side_by_side: int
    """How many of `order` stand side by side at its end."""
    heads: tuple[str, ...]
    embeddings: tuple[str | None, ...]
    """What may be the embedding; None: there may be none."""


def _said(parts: Parts, options: ImportOptions) -> _Said:
    groups = [_group(text, parts) for text in options.order]
    if any(len(group) > 1 for group in groups[:-1]):
        raise refused("--order", f"modules side by side ({SIDE_BY_SIDE}) can only come last")
    order = tuple(name for group in groups for name in group)
    whole = _check_order(order, parts)
    heads = _heads(parts, options)
    side_by_side = len(groups[-1]) if groups else 0
    if whole and heads and order[-side_by_side:] != heads:
        raise refused(f"--head {options.head}", "is not what --order ends with")
    return _Said(order, whole, side_by_side, heads, _embeddings(parts, options, heads))


def _group(text: str, parts: Parts) -> list[str]:
    """The modules of one entry of --order: one, or several side by side."""
    several = [text] if text in parts.names else text.split(SIDE_BY_SIDE)
    return [_named(each.strip(), parts) for each in several]


def _named(text: str, parts: Parts) -> str:
    try:
        return resolved(text, parts.names, "--order")
    except UnsupportedModuleError:
        if text.lower().replace("_", "") in _FUNCTIONS:
            raise refused(
                f"--order: {text}",
                "a bundle has no place for a function between its modules, so this model cannot be"
                " imported; what comes last is said with --activation",
            ) from None
        if text.lower() in _NOTHINGS:
            raise refused(f"--order: {text}", "does nothing after training: leave it out") from None
        raise


def _check_order(order: tuple[str, ...], parts: Parts) -> bool:
    """Whether --order names every module; it may name all recurrent ones alone."""
    for name in order:
        if order.count(name) > 1:
            raise refused(shown_name(name), "--order names it twice")
    if not order:
        return False
    alone = all(name in parts.recurrent for name in order)
    missing = [name for name in (parts.recurrent if alone else parts.names) if name not in order]
    if missing:
        raise refused(
            ",".join(shown_name(name) for name in order),
            f"--order has to name {listed([shown_name(name) for name in missing])} as well:"
            " every module, or the recurrent ones alone",
        )
    return len(order) == len(parts.names)


def _heads(parts: Parts, options: ImportOptions) -> tuple[str, ...]:
    text = options.head
    if text is None:
        return ()
    names = (text,) if text in parts.matrices else parse_names(text.replace(SIDE_BY_SIDE, ","))
    found = tuple(resolved(name, parts.matrices, "--head") for name in names)
    if len(set(found)) != len(found) or not found:
        raise refused(f"--head {text}", "names a module twice, or none")
    return found


def _embeddings(
    parts: Parts, options: ImportOptions, heads: tuple[str, ...]
) -> tuple[str | None, ...]:
    text = options.embedding
    if text is None:
        possible = [name for name, matrix in parts.matrices.items() if matrix.bias is None]
        return (None, *(name for name in possible if name not in heads))
    if text == NO_EMBEDDING and text not in parts.matrices:
        return (None,)
    name = resolved(text, parts.matrices, "--embedding")
    if parts.matrices[name].bias is not None:
        raise refused(name, "--embedding names it; it has a bias, and an nn.Embedding has none")
    if name in heads:
        raise refused(name, "--embedding and --head both name it")
    return (name,)


# --- What the sizes allow ------------------------------------------------------------------------

_Sizes: TypeAlias = Mapping[str, tuple[int, int]]
"""Module -> features it reads and gives; a matrix as an nn.Linear."""


def _sizes(parts: Parts) -> _Sizes:
    sizes = {name: module.sizes for name, module in parts.recurrent.items()}
    for name, matrix in parts.matrices.items():
        sizes[name] = matrix.weight.shape[1], matrix.weight.shape[0]
    for name, norm in parts.norms.items():
        sizes[name] = norm.mean.shape[0], norm.mean.shape[0]
    return sizes


def _readings_of_order(parts: Parts, said: _Said, sizes: _Sizes) -> Iterator[Reading]:
    """What an order of every module can mean: its first matrix may be the embedding."""
    ends = len(said.order) - (said.side_by_side if said.order[-1] in parts.matrices else 0)
    for embedding in said.embeddings:
        if embedding not in (None, said.order[0]):
            continue
        chain = said.order[0 if embedding is None else 1 : ends]
        size = None if embedding is None else parts.matrices[embedding].weight.shape[1]
        for name in chain:
            reads, gives = sizes[name]
            if size not in (None, reads):
                break
            size = gives
        else:
            heads = said.order[ends:]
            if chain and _is_ending(parts, chain, heads, size, sizes):
                yield Reading(embedding, chain, heads)


def _readings_of_sizes(parts: Parts, said: _Said, sizes: _Sizes) -> Iterator[Reading]:
    """Every way that the sizes allow, with the recurrent modules in the order given, if one is."""

    def go_on(
        chain: tuple[str, ...], rest: tuple[str, ...], size: int | None
    ) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        heads = said.heads or rest
        if set(heads) == set(rest) and _is_ending(parts, chain, heads, size, sizes):
            yield chain, heads
        for name in rest:
            reads, gives = sizes[name]
            is_next = name not in said.order or name == next(n for n in said.order if n in rest)
            if is_next and name not in said.heads and size in (None, reads):
                yield from go_on((*chain, name), tuple(n for n in rest if n != name), gives)

    for embedding in said.embeddings:
        rest = tuple(name for name in parts.names if name != embedding)
        size = None if embedding is None else parts.matrices[embedding].weight.shape[1]
        for chain, heads in go_on((), rest, size):
            yield Reading(embedding, chain, heads)


def _is_ending(
    parts: Parts, chain: Sequence[str], heads: Sequence[str], size: int | None, sizes: _Sizes
) -> bool:
    """Whether modules can be the heads behind a chain whose rows have `size` features."""
    if not heads and chain and chain[-1] in parts.matrices:
        return False  # the last of these is the head
    return all(name in parts.matrices and sizes[name][0] == size for name in heads)


# --- Questions -----------------------------------------------------------------------------------


def _question(parts: Parts, options: ImportOptions, found: Sequence[Reading]) -> Exception:
    """Asks which reading it is, each with the options that would say it."""
    shown = found[:READINGS_SHOWN_MAX]
    answers = tuple(_answer(parts, options, each, shown) for each in shown)
    ways = ", or ".join(" ".join(answer) for answer in answers)
    more = ", or another order" if len(found) > len(shown) else ""
    names = listed([shown_name(name) for name in parts.names])
    unusual = any(not each.is_usual(parts) for each in shown)
    if len(found) > 1:
        said = [f"{names}: a state dict does not say in which order these stand: say {ways}{more}"]
        if unusual:
            said.append(
                f"--between {NOTHING} is right only if nothing computes between them: no ReLU, no"
                " residual connection"
            )
    elif unusual:
        said = [
            f"{names}: a state dict does not say what computes between these. If nothing does (no"
            f" ReLU, no residual connection), say {ways}",
            "With an activation between them the model cannot be imported: a bundle has no place"
            " for it",
            *_gaps(shown[0]),
        ]
    else:
        said = [f"{names}: a state dict does not say how these stand: say {ways} if it is so"]
    if len(parts.recurrent) > 1:
        said.append(
            "Recurrent modules that run side by side, or of which one begins with the state of"
            " another (encoder and decoder), have no place in a bundle"
        )
    if any(len(each.heads) > 1 for each in shown):
        said.append("The outputs of heads side by side follow each other in that order")
    for name in dict.fromkeys(each.embedding for each in shown if each.embedding is not None):
        rows = parts.matrices[name].weight.shape[0]
        said.append(f"{shown_name(name)} first would be an nn.Embedding of {rows} tokens")
    if _without_epsilon(parts, options):
        said.append(f"--epsilon is the eps of nn.BatchNorm1d, by default {DEFAULT_EPSILON}")
    return AmbiguousModuleError(". ".join(said), key=parts.names[0], answers=answers)


def _gaps(reading: Reading) -> list[str]:
    """The numbers that an nn.Sequential leaves out, where a module without weights stands."""
    said: list[str] = []
    for first, then in itertools.pairwise(reading.names):
        (owner, _, a), (other, _, b) = first.rpartition("."), then.rpartition(".")
        if owner == other and a.isdecimal() and b.isdecimal() and int(b) - int(a) > 1:
            said.append(
                f"The numbers of {first} and {then} show that there is a module without weights"
                " between them: dropout, or an activation"
            )
    return said


def _answer(
    parts: Parts, options: ImportOptions, reading: Reading, among: Sequence[Reading]
) -> tuple[str, ...]:
    """The options that say a reading."""
    flags = ["--order", reading.order]
    alike = [each for each in among if each.order == reading.order]
    if any(
        each.embedding != reading.embedding for each in alike
    ):  # a first matrix may be a linear layer as well
        flags += ["--embedding", shown_name(reading.embedding) if reading.embedding else "none"]
    if not reading.is_usual(parts):
        flags += ["--between", NOTHING]
        if _without_epsilon(parts, options):
            flags += ["--epsilon", DEFAULT_EPSILON]
            for name, value in options.epsilon.items():
                flags += ["--epsilon", f"{name}={value}"]
    return tuple(flags)


def _nothing_fits(names: Sequence[str], sizes: _Sizes) -> Exception:
    def is_alone(name: str) -> bool:
        reads, gives = sizes[name]
        return not any(
            sizes[other][1] == reads or sizes[other][0] == gives for other in names if other != name
        )

    first = next((name for name in names if is_alone(name)), names[0])
    shown = [first, *(name for name in names if name != first)][:SIZES_SHOWN_MAX]
    said = [
        f"{shown_name(name)} reads {sizes[name][0]} and gives {sizes[name][1]}" for name in shown
    ]
    return refused(
        shown_name(first),
        f"does not fit the others: {', '.join(said)}, in no order that the options allow. A bundle"
        " is embedding, stack and head, without branches and sums",
    )
