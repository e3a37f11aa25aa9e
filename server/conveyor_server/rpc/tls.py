"""The files of TLS: looked at by Python's own TLS, as gRPC does not say what is wrong with them."""

import ssl
from pathlib import Path

import grpc

from conveyor_server.config import ListenConfig


def chain_problem(certificate: Path, key: Path) -> str:
    """Why a chain and a key cannot be used together; empty if they can."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is not that of the first certificate"
        return "not a chain and its private key in PEM"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def authority_problem(ca: Path) -> str:
    """Why nobody could be trusted by a file; empty if somebody can."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(ca)
    except ssl.SSLError:
        return "no certificate in PEM"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _no_passphrase() -> str:
    """Instead of a question on the terminal."""
    raise OSError("the key is encrypted, and the server has no passphrase")


def credentials(listen: ListenConfig) -> grpc.ServerCredentials | None:
    """What the gRPC port shows; None if it speaks no TLS.

    Raises:
        OSError: A file cannot be used; the text names its setting.
    """
    certificate, key, ca = (
        listen.tls_certificate_file,
        listen.tls_key_file,
        listen.tls_client_ca_file,
    )
    if certificate is None or key is None:
        return None
    if problem := chain_problem(certificate, key):
        files = f"listen.tls_certificate_file {certificate} and listen.tls_key_file {key}"
        raise OSError(f"{files}: {problem}")
    if ca is not None and (problem := authority_problem(ca)):
        raise OSError(f"listen.tls_client_ca_file {ca}: {problem}")
    return grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        root_certificates=None if ca is None else ca.read_bytes(),
        require_client_auth=ca is not None,
    )
