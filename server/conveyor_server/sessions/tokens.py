"""Session tokens: proof of a claim, and of the memory it was made in.

A token says nothing a caller may rely on and confers no access; that is what credentials are for.
It tells a server that lost its memory from one that has it.
"""

import base64
import binascii

from conveyor_server.errors import InvalidToken, ServerRestarted


def make_token(session_id: str, epoch: int, incarnation: str) -> str:
    """Makes the token of a claim."""
    text = f"{incarnation}/{epoch}/{session_id}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def check_token(token: str, session_id: str, incarnation: str) -> None:
    """Checks that a token is of that session and of this memory.

    Raises:
        InvalidToken: Malformed, or of another session.
        ServerRestarted: Of another memory.
    """
    try:
        padded = token + "=" * (-len(token) % 4)
        text = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
        its_incarnation, epoch, its_session_id = text.split("/", 2)
        int(epoch)
    except (ValueError, binascii.Error) as error:
        raise InvalidToken(
            "the session token is not valid; pass the one that OpenSession gave, unchanged"
        ) from error
    if its_session_id != session_id:
        raise InvalidToken(f"the session token belongs to another session, not to {session_id!r}")
    if its_incarnation != incarnation:
        raise ServerRestarted(
            f"session {session_id!r} was opened before this server restarted; sessions are kept in"
            " memory only, so its state is gone. Open a new session"
        )
