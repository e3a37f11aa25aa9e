"""Who calls: metadata and bearer tokens."""

import hashlib

import pytest

from conveyor_server.errors import MessageTooLarge, Unauthenticated
from conveyor_server.rpc import access
from conveyor_server.rpc.access import ANONYMOUS, Authenticator, Metadata, check_size, size_of

TOKENS = {f"token-number-{number:04}": f"principal-{number}" for number in range(2_002)}


def bearer(token: str) -> Metadata:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def test_each_token_is_its_principal() -> None:
    authenticator = Authenticator(TOKENS)
    for token, name in TOKENS.items():
        assert authenticator.authenticate(bearer(token)) == name


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        bearer("token-number-2002"),
        bearer(""),
        [("authorization", "Basic token-number-0001")],
        [("authorization", b"Bearer token-number-0001")],
        [*bearer("token-number-0001"), *bearer("token-number-0001")],
        [*bearer("token-number-0001"), ("authorization", "")],
        bearer("token-number-0001\udc80"),
    ],
    ids=str,
)
def test_anything_else_is_nobody(metadata: Metadata) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        Authenticator(TOKENS).authenticate(metadata)
    assert "0001" not in refusal.value.message


def test_without_tokens_everybody_is_one_principal() -> None:
    assert Authenticator({}).authenticate([]) == ANONYMOUS


@pytest.mark.parametrize("count", [1, 2_002])
def test_a_token_is_hashed_once_however_many_there_are(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    authenticator = Authenticator(dict(list(TOKENS.items())[:count]))
    hashed: list[bytes] = []

    def counting(data: bytes, **more: object) -> object:
        hashed.append(data)
        return hashlib.sha256(data)

    class Hashlib:
        blake2b = staticmethod(counting)

    monkeypatch.setattr(access, "hashlib", Hashlib)
    with pytest.raises(Unauthenticated):
        authenticator.authenticate(bearer("token-number-0000"))
    assert hashed == [b"token-number-0000"]


def test_every_entry_counts() -> None:
    metadata = [("a", "1234")] * 4 + [("b-bin", b"123")]
    assert size_of(metadata) == 28
    check_size(28, 28)
    with pytest.raises(MessageTooLarge) as refusal:
        check_size(29, 28)
    assert refusal.value.metadata == {"limit": "limits.metadata_bytes_max", "maximum": "28"}
