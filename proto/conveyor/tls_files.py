"""Whether a certificate chain and a private key can be used together."""

import ssl
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

PairProblem: TypeAlias = Literal["encrypted", "apart", "damaged"]


def pair_problem(context: ssl.SSLContext, chain: Path, key: Path) -> PairProblem | None:
    """Loads a chain and its key; both files exist.

    Args:
        context: What they are loaded into.
        chain: PEM, the own certificate first.
        key: PEM.

    Returns:
        None if they can be used; else "encrypted" where the key needs a passphrase, "apart" where
        it is the key of another certificate, "damaged" where one of them is not PEM.
    """
    try:
        context.load_cert_chain(chain, key, password=_no_passphrase)
    except _EncryptedError:
        return "encrypted"
    except ssl.SSLError as error:
        return "apart" if error.reason == "KEY_VALUES_MISMATCH" else "damaged"
    return None


class _EncryptedError(Exception):
    pass


def _no_passphrase() -> NoReturn:
    raise _EncryptedError  # instead of a question on the terminal
