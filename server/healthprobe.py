"""Asks a server for its health and exits 0 where it serves: the container's health check.

    python healthprobe.py [ADDRESS] [--tls] [--ca FILE] [--cert FILE] [--key FILE]

Without an address it asks the server that its own environment and CONVEYOR_CONFIG describe, on
loopback, and speaks TLS if that one does. What is not well is one line on standard error.

A certificate is issued for the name that clients use, never for loopback, and its file may have
been renewed since the server read it. So the probe of the server beside it takes the certificate
that it is shown, by a name that is in it: it sends nothing that is worth a theft, and whoever could
answer in the server's place there could stop it as well. To any address that is named, and
wherever `--ca` is given, certificate and name are verified as by every client.
"""

import argparse
import json
import os
import socket
import ssl
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # which gRPC reads as it is imported

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PORT_DEFAULT = "50051"
ANSWER_SECONDS_MAX = 3.0
EVERY_ADDRESS = ("", "0.0.0.0", "[::]")  # noqa: S104  not listened on here
_TRUE = ("1", "true", "t", "yes", "y", "on")
_NAMES = ("DNS", "IP Address")


@dataclass(frozen=True)
class Wanted:
    """Whom to ask, and how."""

    address: str
    beside: bool  # the server of the same container
    tls: bool
    ca: str | None
    cert: str | None
    key: str | None


def settings_of_server() -> Mapping[str, str]:
    """What the server in the same container is told of where and how it listens."""
    listen: dict[str, str] = {}
    if file := os.environ.get("CONVEYOR_CONFIG"):
        listen = tomllib.loads(Path(file).read_text(encoding="utf-8")).get("listen", {})
    if section := os.environ.get("CONVEYOR_LISTEN"):
        listen |= json.loads(section)
    prefix = "CONVEYOR_LISTEN__"
    told = {k.removeprefix(prefix): v for k, v in os.environ.items() if k.startswith(prefix)}
    return listen | {name.lower(): value for name, value in told.items()}


def wanted(arguments: list[str]) -> Wanted:
    """Reads the command line, then what stands in for it."""
    parser = argparse.ArgumentParser(description="Exits 0 if a Conveyor server serves.")
    parser.add_argument("address", nargs="?")
    parser.add_argument("--tls", action="store_true", default=None)
    for name, what in (("ca", "whom to trust"), ("cert", "own chain"), ("key", "its key")):
        default = os.environ.get(f"CONVEYOR_{name.upper()}") or None
        parser.add_argument(f"--{name}", metavar="FILE", default=default, help=f"PEM: {what}")
    given = parser.parse_args(arguments)
    if (given.cert is None) != (given.key is None):
        give_up("--cert and --key need each other")
    beside = given.address is None
    listen = settings_of_server() if beside else {}
    if beside:
        host, _, port = listen.get("address", "").rpartition(":")
        host = "127.0.0.1" if host in EVERY_ADDRESS else host
        given.address = f"{host}:{port or PORT_DEFAULT}"
    if listen.get("tls_client_ca_file") and given.cert is None:
        # The server's own certificate is the one that is at hand.
        given.cert, given.key = listen["tls_certificate_file"], listen["tls_key_file"]
    tls = given.tls or given.ca or given.cert or listen.get("tls_certificate_file")
    tls = tls or os.environ.get("CONVEYOR_TLS", "").lower() in _TRUE
    return Wanted(given.address, beside, bool(tls), given.ca, given.cert, given.key)


def give_up(why: object) -> NoReturn:
    """Says in one line why the server is not known to serve."""
    sys.exit(f"healthprobe: {why}")  # status 1


def shown_by(address: str) -> tuple[bytes, str]:
    """The certificate that a server shows, in PEM, and a name that is in it."""
    host, _, port = address.rpartition(":")
    where = (host.strip("[]"), int(port))
    chain = ssl.get_server_certificate(where, timeout=ANSWER_SECONDS_MAX)
    # Only of a certificate that was verified does Python tell what is in it.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=chain)
    plain = socket.create_connection(where, ANSWER_SECONDS_MAX)
    with plain, context.wrap_socket(plain) as secured:
        found = cast(dict[str, Any], secured.getpeercert())
    names = [name for kind, name in found.get("subjectAltName", ()) if kind in _NAMES]
    subject = [pair for part in found.get("subject", ()) for pair in part]
    names += [value for key, value in subject if key == "commonName"]
    if not names:
        raise ValueError(f"the certificate of {address} has no name in it")
    return chain.encode(), names[0].replace("*", "probe")


def channel_to(asked: Wanted) -> grpc.Channel:
    """Opens a channel."""
    if not asked.tls:
        return grpc.insecure_channel(asked.address)
    roots, options = None, list[tuple[str, str]]()
    if asked.ca is not None:
        roots = Path(asked.ca).read_bytes()
    elif asked.beside:
        roots, name = shown_by(asked.address)
        options.append(("grpc.ssl_target_name_override", name))
    key = None if asked.key is None else Path(asked.key).read_bytes()
    cert = None if asked.cert is None else Path(asked.cert).read_bytes()
    return grpc.secure_channel(
        asked.address, grpc.ssl_channel_credentials(roots, key, cert), options
    )


def check(asked: Wanted) -> None:
    """Returns if the server says SERVING within the deadline."""
    with channel_to(asked) as channel:
        stub = cast(Any, health_pb2_grpc.HealthStub(channel))  # its types lack the methods
        request = health_pb2.HealthCheckRequest(service="")
        try:
            answer: health_pb2.HealthCheckResponse = stub.Check(request, timeout=ANSWER_SECONDS_MAX)
        except grpc.RpcError as error:
            give_up(f"{asked.address}: {cast(grpc.Call, error).details()}")
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        give_up(f"{asked.address}: {status}")


if __name__ == "__main__":
    try:
        check(wanted(sys.argv[1:]))
    except (OSError, ValueError) as problem:
        give_up(problem)
