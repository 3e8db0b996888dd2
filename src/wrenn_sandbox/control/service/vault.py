"""What follows from the key of an installation: sealed secrets, and authorities of sandboxes.

Whoever has the key and the database has every secret. Whoever loses it has none: values have to be
set again, and running sandboxes get other authorities with their next policy.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wrenn_sandbox.ids import Random, SandboxId, new_random

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_SCALAR_BYTES: Final = 48
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of P-256 (FIPS 186-4, D.1.2.3)."""
_VALID: Final = datetime(2020, 1, 1, tzinfo=UTC), datetime(2099, 1, 1, tzinfo=UTC)
"""The same each time, so that an authority stays what it is, and whatever a guest's clock says."""


class Unsealable(Exception):
    """Sealed with another key, for something else, or damaged."""


class Vault:
    """`key` is a text that nobody can guess."""

    def __init__(self, key: str, random: Random = new_random) -> None:
        self._key = key.encode()
        self._cipher = AESGCM(self._derived("secrets", _KEY_BYTES))
        self._random = random

    def seal(self, value: str, purpose: str) -> bytes:
        """Encrypt a value; only for the same purpose it is unsealed."""
        nonce = self._random(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, value.encode(), purpose.encode())

    def unseal(self, sealed: bytes, purpose: str) -> str:
        """Raises `Unsealable`."""
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, rest, purpose.encode()).decode()
        except (InvalidTag, ValueError) as error:
            raise Unsealable from error

    def authority(self, sandbox_id: SandboxId) -> "Authority":
        """The certificate authority of a sandbox, always the same one."""
        number = int.from_bytes(self._derived(f"authority of {sandbox_id}", _SCALAR_BYTES))
        key = ec.derive_private_key(number % (_ORDER - 1) + 1, ec.SECP256R1())
        return Authority(key, f"Wrenn, for secrets of {sandbox_id}")

    def _derived(self, info: str, length: int) -> bytes:
        derivation = HKDF(SHA256(), length, salt=b"wrenn", info=info.encode())
        return derivation.derive(self._key)


class Authority:
    """Vouches for hosts to one sandbox. Its own key is not given out."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, name: str) -> None:
        self._key = key
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())

    def certificate(self) -> str:
        """Its own certificate as PEM, always the same text."""
        builder = self._builder(self._name, self._key.public_key()).serial_number(1)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        builder = builder.add_extension(_usage(signs_certificates=True), True)
        builder = builder.add_extension(self._identifier, False)
        return self._signed(builder)

    def certify(self, names: Sequence[str]) -> tuple[str, str]:
        """A certificate for these hosts, and its new key, both as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Wrenn")])
        builder = self._builder(subject, key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        extensions: tuple[tuple[x509.ExtensionType, bool], ...] = (
            (x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs_certificates=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
            (
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._identifier),
                False,
            ),
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return self._signed(builder), private.decode()

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder(self._name, subject, key)
        return builder.not_valid_before(_VALID[0]).not_valid_after(_VALID[1])

    def _signed(self, builder: x509.CertificateBuilder) -> str:
        signed = builder.sign(self._key, SHA256(), ecdsa_deterministic=True)
        return signed.public_bytes(Encoding.PEM).decode()


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
