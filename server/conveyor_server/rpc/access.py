"""Who calls: metadata, bearer tokens and the principal of a call."""

import contextvars
import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from conveyor_server.errors import MessageTooLarge, Unauthenticated

ANONYMOUS: Final = "anonymous"
_BEARER: Final = "Bearer "

Metadata = Sequence[tuple[str, str | bytes]]

_principal: contextvars.ContextVar[str] = contextvars.ContextVar("principal", default=ANONYMOUS)


def principal() -> str:
    """The authenticated caller of the call being handled."""
    return _principal.get()


def act_for(caller: str) -> None:
    """Makes `caller` the principal of the running task's call."""
    _principal.set(caller)


def size_of(metadata: Metadata) -> int:
    """The bytes of a call's metadata; keys that are repeated count each time."""
    return sum(len(key) + len(value) for key, value in metadata)


def check_size(size: int, bytes_max: int) -> None:
    """Checks the size of a call's metadata.

    Raises:
        MessageTooLarge: It is larger than `bytes_max`.
    """
    if size > bytes_max:
        raise MessageTooLarge(
            f"the metadata has {size:,} bytes",
            limit="limits.metadata_bytes_max",
            maximum=bytes_max,
        )


class Authenticator:
    """Maps bearer tokens to principals.

    Tokens are looked up by a digest under a key of this process: one lookup, however many there
    are, and nothing about a token can be learnt from how long it takes.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        """Without tokens everybody is the one principal `anonymous`."""
        self._key = secrets.token_bytes(32)
        self._principals = {self._digest(token): name for token, name in tokens.items()}

    def authenticate(self, metadata: Metadata) -> str:
        """Returns the caller's principal.

        Raises:
            Unauthenticated: No token, several, a malformed or an unknown one.
        """
        if not self._principals:
            return ANONYMOUS
        found = self._principals.get(self._digest(_bearer_token(_authorizations(metadata))))
        if found is None:
            raise Unauthenticated("the server does not know this bearer token (auth.tokens)")
        return found

    def _digest(self, token: str) -> bytes:
        data = token.encode(errors="surrogatepass")
        return hashlib.blake2b(data, key=self._key, digest_size=32).digest()


def _authorizations(metadata: Iterable[tuple[str, str | bytes]]) -> list[str | bytes]:
    return [value for key, value in metadata if key == "authorization"]


def _bearer_token(values: list[str | bytes]) -> str:
    if len(values) > 1:  # a proxy in between may have checked another one than we would
        raise Unauthenticated(
            f"metadata 'authorization' was sent {len(values)} times; send one bearer token"
        )
    value = values[0] if values else ""
    if not isinstance(value, str) or not value.startswith(_BEARER):
        raise Unauthenticated(
            "this server needs a token: send metadata 'authorization: Bearer TOKEN'"
        )
    return value.removeprefix(_BEARER)
