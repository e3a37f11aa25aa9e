"""TLS of the command: its files, read and checked, and what went wrong in words."""

import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from conveyor.os_errors import os_error_text
from conveyor.tls_files import pair_problem
from conveyor_client._calls import Tls
from conveyor_client.cli._common import fail

_PROBE_SECONDS_MAX = 3.0
_TARGET = re.compile(r"(?:dns:(?:///)?|ipv[46]:)?\[?([^\[\]/]+?)\]?:(\d+)")
_WRONG_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_NOT_TRUSTED = (18, 19, 20, 21)  # self-signed, or signed by somebody unknown


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files named on the command line.

    Attributes:
        tls: What the client is given.
        context: The same for Python's own TLS.
    """

    tls: Tls
    context: ssl.SSLContext


def read_files(ca: Path | None, cert: Path | None, key: Path | None) -> TlsFiles:
    """Reads the files; one that cannot be used ends the command.

    Args:
        ca: Whom to trust, in PEM; None means the system's roots.
        cert: The client's own chain, in PEM.
        key: Its private key, in PEM.
    """
    if (cert is None) != (key is None):
        given, missing = ("--cert", "--key") if key is None else ("--key", "--cert")
        fail(f"{given} needs {missing}: a client certificate is a chain and its private key")
    roots, chain, private = _read("--ca", ca), _read("--cert", cert), _read("--key", key)
    context = ssl.create_default_context()
    if roots is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        except (ssl.SSLError, ValueError):
            fail(f"--ca {ca}: there is no certificate in PEM in it")
    if cert is not None and key is not None:
        _load_chain(context, cert, key)
    return TlsFiles(Tls(roots, private, chain), context)


def _read(option: str, file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        fail(f"{option} {os_error_text(error, file)}")


def _load_chain(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    match pair_problem(context, cert, key):
        case "encrypted":
            fail(f"--key {key}: the key is encrypted; give one without a passphrase")
        case "apart":
            fail(f"--cert {cert} and --key {key} do not belong together")
        case "damaged":
            both = f"--cert {cert} and --key {key}"
            fail(f"{both}: expected a chain and its private key, both in PEM")
        case None:
            pass


def explain(target: str, files: TlsFiles | None) -> str:
    """Looks once more at a server that could not be talked to, for what TLS has to do with it.

    Args:
        target: As gRPC names it.
        files: How TLS was spoken; None if it was not.

    Returns:
        What is wrong and what to try; empty if it is not TLS, or if it cannot be told.
    """
    matched = _TARGET.fullmatch(target)
    if matched is None:
        return ""
    host, port = matched[1], int(matched[2])
    try:
        connection = socket.create_connection((host, port), timeout=_PROBE_SECONDS_MAX)
    except (OSError, UnicodeError):  # the latter: no host can have that name
        return ""
    with connection:
        if files is None:
            return _explain_plain(target, connection)
        return _explain_tls(target, host, connection, files)


def _explain_plain(target: str, connection: socket.socket) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection):
            pass
    except OSError:  # ssl's own errors are such too
        return ""
    return (
        f"{target} speaks TLS: try --tls, with --ca FILE unless a public authority signed its"
        " certificate"
    )


def _explain_tls(target: str, host: str, connection: socket.socket, files: TlsFiles) -> str:
    context = files.context
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            # Only behind the handshake of TLS 1.3 is a client's certificate looked at.
            refused = secured.recv(1) == b""
    except TimeoutError:
        return ""
    except ssl.SSLCertVerificationError as error:
        return _explain_certificate(target, host, error)
    except OSError as error:  # ssl's own errors are such too
        reason = getattr(error, "reason", None) or ""
        if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
            return _client_certificate(target, files)
        if "ALERT" in reason:
            return f"{target} refuses the TLS connection: {reason.lower().replace('_', ' ')}"
        return f"{target} does not speak TLS: leave out --tls, or try another port"
    return _client_certificate(target, files) if refused else ""


def _client_certificate(target: str, files: TlsFiles) -> str:
    if files.tls.certificate_chain is None:
        return f"{target} asks for a client certificate: give one with --cert and --key"
    return f"{target} does not accept the client certificate of --cert and --key"


def _explain_certificate(target: str, host: str, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _WRONG_NAME:
        return f"the certificate of {target} is not for {host}: use a name that is in it"
    advice = "; name whom to trust with --ca FILE" if error.verify_code in _NOT_TRUSTED else ""
    return f"the certificate of {target} is refused: {error.verify_message}{advice}"
