"""The TLS files of the server: whether they can be used, and if not, which one and why."""

import ssl
from pathlib import Path
from typing import Final

import grpc

from conveyor.os_errors import os_error_text
from conveyor.tls_files import pair_problem
from conveyor_server.config import ListenConfig

CERTIFICATE: Final = "listen.tls_certificate_file"
KEY: Final = "listen.tls_key_file"
CLIENT_CA: Final = "listen.tls_client_ca_file"


class TlsFilesError(Exception):
    """The files cannot be used; the message names the setting."""


def read_pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Reads a certificate chain and its private key, and checks that they belong together.

    Raises:
        TlsFilesError: One cannot be read, is not PEM, or they do not belong together.
    """
    chain, private = _read(CERTIFICATE, certificate), _read(KEY, key)
    if b"-----BEGIN CERTIFICATE-----" not in chain:
        raise TlsFilesError(f"{CERTIFICATE}: {certificate} holds no certificate in PEM")
    if b"PRIVATE KEY-----" not in private:
        raise TlsFilesError(f"{KEY}: {key} holds no private key in PEM")
    match pair_problem(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key):
        case "encrypted":
            raise TlsFilesError(f"{KEY}: {key} is encrypted; decrypt it for the server")
        case "apart":
            raise TlsFilesError(f"{KEY}: {key} is not the key of the certificate in {certificate}")
        case "damaged":
            raise TlsFilesError(f"{CERTIFICATE} and {KEY}: {certificate} or {key} is damaged")
        case None:
            return chain, private


def read_authorities(file: Path) -> bytes:
    """Reads the certificates of whoever signs those of clients.

    Raises:
        TlsFilesError: It cannot be read, or is no certificate in PEM.
    """
    authorities = _read(CLIENT_CA, file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(file)
    except ssl.SSLError as error:
        raise TlsFilesError(f"{CLIENT_CA}: {file} holds no certificate in PEM") from error
    return authorities


def credentials(listen: ListenConfig) -> grpc.ServerCredentials | None:
    """What the gRPC port shows; None if it speaks no TLS.

    Raises:
        TlsFilesError: A file cannot be used.
    """
    certificate, key = listen.tls_certificate_file, listen.tls_key_file
    if certificate is None or key is None:
        return None
    chain, private = read_pair(certificate, key)
    ca = listen.tls_client_ca_file
    authorities = None if ca is None else read_authorities(ca)
    return grpc.ssl_server_credentials(
        [(private, chain)], authorities, require_client_auth=authorities is not None
    )


def _read(setting: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TlsFilesError(f"{setting}: {os_error_text(error, file)}") from error
