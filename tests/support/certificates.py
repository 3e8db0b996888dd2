"""Certificates for tests, made by openssl."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path


def make_pair(
    directory: Path, name: str = "server", kind: str = "ec", names: str = "IP:127.0.0.1"
) -> Pair:
    """A certificate that is its own issuer and nobody else's, and its key: `ec` or `rsa`."""
    pair = Pair(directory / f"{name}.pem", directory / f"{name}.key")
    curve = ("-pkeyopt", "ec_paramgen_curve:prime256v1") if kind == "ec" else ()
    request = ("openssl", "req", "-x509", "-newkey", kind, *curve, "-nodes", "-days", "2")
    subject = ("-subj", f"/CN={name}", "-addext", f"subjectAltName={names}")
    leaf = ("-addext", "basicConstraints=critical,CA:FALSE")
    files = ("-keyout", str(pair.key), "-out", str(pair.cert))
    subprocess.run([*request, *subject, *leaf, *files], check=True, capture_output=True)
    pair.key.chmod(0o600)
    return pair
