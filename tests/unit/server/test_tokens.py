"""Session tokens."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.core import OpenMode
from conveyor_server.errors import InvalidToken, ServerRestarted, SessionExpired
from conveyor_server.sessions.tokens import check_token, make_token
from tests.support.rig import Rig

INCARNATIONS = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
IDS = st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True)


@given(
    session_id=IDS,
    epoch=st.integers(1, 2**62),
    incarnation=st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
)
def test_a_token_passes_for_its_session_and_life_only(
    session_id: str, epoch: int, incarnation: str
) -> None:
    token = make_token(session_id, epoch, incarnation)
    assert token.isascii()
    assert token.isprintable()
    check_token(token, session_id, incarnation)
    with pytest.raises(InvalidToken):
        check_token(token, session_id + "x", incarnation)
    with pytest.raises(ServerRestarted):
        check_token(token, session_id, "another")


@given(st.text(max_size=80))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises((InvalidToken, ServerRestarted)):
        check_token(text, "s", "life")


@given(st.binary(max_size=60))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((InvalidToken, ServerRestarted)):
        check_token(base64.urlsafe_b64encode(data).decode(), "s", "life")


def test_an_epoch_has_to_be_a_number() -> None:
    token = base64.urlsafe_b64encode(b"life/one/s").decode()
    with pytest.raises(InvalidToken):
        check_token(token, "s", "life")


def test_a_server_that_lost_its_memory_says_so() -> None:
    rig = Rig()
    token = rig.open().token
    assert rig.open(token=token).resumed
    with pytest.raises(ServerRestarted):
        rig.open(token=make_token("s", 1, "an earlier life"))
    with pytest.raises(InvalidToken):
        rig.open(token="never a token")
    assert rig.view().epoch == 2


def test_resuming_an_expired_session_says_so() -> None:
    rig = Rig(idle_seconds_default=1)
    token = rig.open().token
    rig.clock.advance(1)
    rig.run()
    with pytest.raises(SessionExpired):
        rig.open(mode=OpenMode.RESUME, token=token)
