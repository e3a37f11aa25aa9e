"""Our messages against the client's: every name, number, type, label, oneof and map."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf import descriptor_pb2

from conveyor.oip import config_pb2, inference_pb2
from tests.integration.oip.conftest import RunProgram

Facts = dict[str, Any]


def facts(files: Sequence[descriptor_pb2.FileDescriptorProto]) -> Facts:
    """All that the wire and generated code depend on, by full name."""
    found: Facts = {}
    for file in files:
        assert file.package == "inference"
        assert file.syntax == "proto3"
        for message in file.message_type:
            found.update(message_facts(message, ""))
        for enum in file.enum_type:
            found[enum.name] = [(value.name, value.number) for value in enum.value]
        for service in file.service:
            for method in service.method:
                found[f"{service.name}.{method.name}"] = (
                    method.input_type,
                    method.output_type,
                    method.client_streaming,
                    method.server_streaming,
                )
    return found


def message_facts(message: descriptor_pb2.DescriptorProto, outer: str) -> Iterator[tuple[str, Any]]:
    name = f"{outer}{message.name}"
    yield name, ("map" if message.options.map_entry else "message")
    for field in message.field:
        of = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        yield (
            f"{name}.{field.name}",
            (field.number, field.type, field.label, field.type_name, of, field.proto3_optional),
        )
    for enum in message.enum_type:
        yield f"{name}.{enum.name}", [(value.name, value.number) for value in enum.value]
    for nested in message.nested_type:
        yield from message_facts(nested, f"{name}.")


def test_the_messages_are_those_of_the_client(run_program: RunProgram) -> None:
    theirs = facts(
        [
            descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(file))
            for file in run_program("descriptors")
        ]
    )
    ours = facts(
        [
            descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
            for module in (config_pb2, inference_pb2)
        ]
    )
    assert len(ours) > 300
    assert ours == theirs


def test_a_difference_would_be_seen() -> None:
    file = descriptor_pb2.FileDescriptorProto.FromString(inference_pb2.DESCRIPTOR.serialized_pb)
    before = facts([file])
    (message,) = (each for each in file.message_type if each.name == "InferParameter")
    message.field[1].number = 9
    assert facts([file]) != before
