"""What gRPC itself says of a failed call, in words for people and without its internals."""

import re
from typing import Final

import grpc

# The first row with a word that occurs decides.
_CANNOT_REACH: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        ("uri is not valid", "create channel", "Misformatted", "ipv4_addresses", "no host"),
        "cannot reach {target!r}: that is not an address; expected host:port",
    ),
    (
        ("errors resolving", "DNS resolution failed", "name not found", "lookup failed"),
        "cannot reach {target}: its host name cannot be resolved",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "cannot reach {target}: its certificate is not trusted; pass its authority with"
        " tls=Tls(root_certificates=...), or with --ca",
    ),
    (
        ("andshake", "SETTINGS frame", "parsing HTTP/2", "http1.x"),
        "cannot reach {target}: what answers there does not speak gRPC, or one side speaks TLS and"
        " the other does not",
    ),
    (
        (": Socket closed",),  # the whole text of a stream that broke is "Socket closed"
        "cannot reach {target}: it closed the connection; if it speaks TLS, pass tls=Tls(), or"
        " --tls",
    ),
    (("failed to connect", "onnect failed"), "cannot reach {target}: is the server running?"),
)
_LARGER: Final = re.compile(r"(CLIENT|SERVER): .*larger than max \((\d+) vs\. (\d+)\)")
_INTERNALS: Final = re.compile(r"ipv[46]:|unix:|UNKNOWN|RST_STREAM|recvmsg|sendmsg|rrno|[{\[]")


def call_message(
    code: grpc.StatusCode, details: str, target: str, timeout_seconds: float | None
) -> str:
    """Says why a call failed that no server of ours answered.

    Args:
        code: Its status.
        details: Its text, empty perhaps.
        target: Where the server should be.
        timeout_seconds: How long the call was given, if that is known.

    Returns:
        One sentence.
    """
    target = target or "the server"
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            within = "in time" if timeout_seconds is None else f"within {timeout_seconds:g} s"
            return f"no answer from {target} {within}"
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return _exhausted(details)
        case grpc.StatusCode.UNIMPLEMENTED if not details or "ethod not found" in details:
            return f"unknown method: is {target} a Conveyor server of this version?"
        case (
            grpc.StatusCode.UNAVAILABLE
            | grpc.StatusCode.INTERNAL
            | grpc.StatusCode.CANCELLED
            | grpc.StatusCode.UNKNOWN
        ):
            return _broken(details, target)
        case _:
            return details or code.name


def _broken(details: str, target: str) -> str:
    for words, sentence in _CANNOT_REACH:
        if any(word in details for word in words):
            return sentence.format(target=target)
    # A proxy's own words help; the core's say nothing to who did not write it.
    why = f": {details}" if details and not _INTERNALS.search(details) else ""
    return f"the connection to {target} broke{why}"


def _exhausted(details: str) -> str:
    larger = _LARGER.search(details)
    if larger is not None:
        size, bound = int(larger[2]), int(larger[3])
        if larger[1] == "CLIENT":
            return f"the answer has {size:,} bytes (Options.message_bytes_max is {bound:,})"
        return (
            f"the message has {size:,} bytes, too many for limits.message_bytes_max of the server"
        )
    if "oncurrent RPC" in details:
        return (
            "the server has too many calls at once (limits.concurrent_calls_max); try again later"
        )
    if "metadata size" in details:
        return "the call's metadata is too large for the server (limits.metadata_bytes_max)"
    return details or "RESOURCE_EXHAUSTED"
