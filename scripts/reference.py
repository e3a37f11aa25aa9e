"""Writes the reference of the contract, as Markdown, from the .proto files and their comments.

    python scripts/reference.py FOLDER     one page for each file

The documentation's site makes them by itself (`scripts/docs_hook.py`).
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import proto
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

# Numbers of the fields of the descriptors, of which a comment's path consists.
MESSAGE: Final = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER
ENUM: Final = FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER
SERVICE: Final = FileDescriptorProto.SERVICE_FIELD_NUMBER
METHOD: Final = ServiceDescriptorProto.METHOD_FIELD_NUMBER
FIELD: Final = DescriptorProto.FIELD_FIELD_NUMBER
NESTED: Final = DescriptorProto.NESTED_TYPE_FIELD_NUMBER
NESTED_ENUM: Final = DescriptorProto.ENUM_TYPE_FIELD_NUMBER
VALUE: Final = EnumDescriptorProto.VALUE_FIELD_NUMBER

SCALARS: Final = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in FieldDescriptorProto.Type.items()
    if name not in ("TYPE_MESSAGE", "TYPE_ENUM", "TYPE_GROUP")
}
Place = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """One file of the contract as a page."""

    name: str
    """Of the page's file, for instance conveyor.v1.session.md."""
    title: str
    text: str


def descriptors() -> list[FileDescriptorProto]:
    """The contract's files with their comments, in order of name."""
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch, "image.binpb")
        proto.run_protoc(proto.PROTO_ROOT, [f"-o{image}", "--include_source_info"])
        return list(FileDescriptorSet.FromString(image.read_bytes()).file)


def pages() -> list[Page]:
    """A page for each file of the contract that defines something."""
    files = descriptors()
    homes = {
        f".{file.package}.{name}": page_name(file) for file in files for name in type_names(file)
    }
    return [Writer(file, homes).page() for file in files]


def page_name(file: FileDescriptorProto) -> str:
    """Where a file's page goes."""
    return file.name.removesuffix(".proto").replace("/", ".") + ".md"


def type_names(file: FileDescriptorProto) -> Iterator[str]:
    """The messages and enums of a file, those within others by their full name."""
    for message in file.message_type:
        yield from _names_within(message, message.name)
    yield from (enum.name for enum in file.enum_type)


def _names_within(message: DescriptorProto, name: str) -> Iterator[str]:
    yield name
    for nested in message.nested_type:
        yield from _names_within(nested, f"{name}.{nested.name}")
    yield from (f"{name}.{enum.name}" for enum in message.enum_type)


class Writer:
    """Writes one page."""

    def __init__(self, file: FileDescriptorProto, homes: dict[str, str]) -> None:
        """``homes``: the page of every type of the contract."""
        self._file = file
        self._homes = homes
        self._lines: list[str] = []
        self._comments: dict[Place, str] = {
            tuple(location.path): location.leading_comments
            for location in file.source_code_info.location
        }

    def page(self) -> Page:
        """The whole of it."""
        title = f"{self._file.package}: {Path(self._file.name).stem}"
        self._say(f"# {title}", f"Package `{self._file.package}`, file `{self._file.name}`.")
        for index, service in enumerate(self._file.service):
            self._service(service, (SERVICE, index))
        for index, message in enumerate(self._file.message_type):
            self._message(message, message.name, (MESSAGE, index))
        for index, enum in enumerate(self._file.enum_type):
            self._enum(enum, enum.name, (ENUM, index))
        return Page(page_name(self._file), title, "\n\n".join(self._lines) + "\n")

    def _say(self, *paragraphs: str) -> None:
        self._lines += [paragraph for paragraph in paragraphs if paragraph]

    def _service(self, service: ServiceDescriptorProto, place: Place) -> None:
        self._say(f"## {service.name} {{ #{service.name} }}", self._comment(place))
        for index, method in enumerate(service.method):
            taken = self._type(method.input_type, streamed=method.client_streaming)
            given = self._type(method.output_type, streamed=method.server_streaming)
            self._say(
                f"### {method.name} {{ #{service.name}.{method.name} }}",
                f"Takes {taken}, returns {given}.",
                self._comment((*place, METHOD, index)),
            )

    def _message(self, message: DescriptorProto, name: str, place: Place) -> None:
        if message.options.map_entry:
            return
        self._say(f"## {name} {{ #{name} }}", self._comment(place))
        maps = {f"{nested.name}": nested for nested in message.nested_type}
        rows = [
            (
                f"`{field.name}`",
                self._field_type(field, maps) + self._choice(message, field),
                str(field.number),
                self._comment((*place, FIELD, index), cell=True),
            )
            for index, field in enumerate(message.field)
        ]
        self._table(("field", "type", "number", "meaning"), rows)
        for index, nested in enumerate(message.nested_type):
            self._message(nested, f"{name}.{nested.name}", (*place, NESTED, index))
        for index, enum in enumerate(message.enum_type):
            self._enum(enum, f"{name}.{enum.name}", (*place, NESTED_ENUM, index))

    def _enum(self, enum: EnumDescriptorProto, name: str, place: Place) -> None:
        self._say(f"## {name} {{ #{name} }}", self._comment(place))
        rows = [
            (f"`{value.name}`", str(value.number), self._comment((*place, VALUE, index), cell=True))
            for index, value in enumerate(enum.value)
        ]
        self._table(("value", "number", "meaning"), rows)

    def _table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if rows:
            lines = [header, ["---"] * len(header), *rows]
            self._say("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def _field_type(self, field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
        entry = maps.get(field.type_name.rpartition(".")[2])
        if entry is not None and entry.options.map_entry:
            key, value = (self._field_type(each, {}) for each in entry.field)
            return f"map of {key} to {value}"
        name = self._type(field.type_name) if field.type_name else SCALARS[field.type]
        many = field.label == FieldDescriptorProto.LABEL_REPEATED
        return f"repeated {name}" if many else name

    @staticmethod
    def _choice(message: DescriptorProto, field: FieldDescriptorProto) -> str:
        """What is said of a field of which only one in a group is set."""
        if not field.HasField("oneof_index") or field.proto3_optional:
            return ""
        return f", one of `{message.oneof_decl[field.oneof_index].name}`"

    def _type(self, full_name: str, *, streamed: bool = False) -> str:
        home = self._homes.get(full_name)
        if home is None:
            name = f"`{full_name.removeprefix('.')}`"
        else:
            # Types of the contract are named without their package, which the page's title has.
            local = full_name.removeprefix(f".{self._file.package}.").removeprefix(".")
            where = "" if home == page_name(self._file) else home
            name = f"[`{local}`]({where}#{local})"
        return f"a stream of {name}" if streamed else name

    def _comment(self, place: Place, *, cell: bool = False) -> str:
        """The comment above something, with what Markdown would take for its own escaped."""
        paragraphs = (
            " ".join(each.split()) for each in self._comments.get(place, "").split("\n\n")
        )
        text = "\n\n".join(_escaped(paragraph) for paragraph in paragraphs if paragraph)
        return text.replace("\n\n", "<br>") if cell else text


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    for character in "\\`*_|[]":
        text = text.replace(character, f"\\{character}")
    return text


def main() -> None:
    """Writes the pages into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages():
        (folder / page.name).write_text(page.text, encoding="utf-8")


if __name__ == "__main__":
    main()
