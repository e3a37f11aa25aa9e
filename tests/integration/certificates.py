"""Certificates for servers and clients, made anew for each run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificate:
    """Files of one certificate."""

    chain: Path
    key: Path


class Authority:
    """Issues certificates; ``ca`` is the file that trusts them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, *names: str) -> Certificate:
        """A certificate for host names, addresses or mail addresses, named by the first."""
        issued = self._ca.issue_cert(*names)
        stem = names[0].replace("*", "any").replace(":", "-")
        files = Certificate(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        files.chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(files.key)
        return files


def settings_of(certificate: Certificate) -> dict[str, object]:
    """What makes a server speak TLS."""
    return {
        "listen.tls_certificate_file": certificate.chain,
        "listen.tls_key_file": certificate.key,
    }
