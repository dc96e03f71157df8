"""Who signs: a certificate chain and its private key, from files of the operator or self-made once on the storage.

A self-made chain proves that a picture is unchanged since this service signed it, not who the service is: readers show
its signer as untrusted. What a real certificate needs is in `docs/provenance.md`.
"""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from training.errors import UserError
from training.storage.storage import Storage

KEY = "marks/authority.pem"
_YEARS = 10
_PEM = serialization.Encoding.PEM
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True, slots=True)
class Authority:
    """A chain (PEM, leaf first), the leaf's private key (PEM), and the algorithm that C2PA calls it by."""

    chain: bytes
    key: bytes
    algorithm: str


def own_authority(storage: Storage) -> Authority:
    """The self-made chain on `storage`; made by the first who asks."""
    if not storage.exists(KEY):
        storage.create(KEY, _make())
    pem = storage.get(KEY)
    end = pem.find(b"-----BEGIN CERTIFICATE-----")
    return checked_authority(pem[end:], f"{KEY} on the storage", pem[:end], f"{KEY} on the storage")


def authority_of_files(certificate: str | None, key: str | None) -> Authority:
    """The operator's chain. Raises UserError naming the file that is missing, broken, expired or of another key."""
    for given, flag, other in ((certificate, "--certificate", key), (key, "--certificate-key", certificate)):
        if given is None and other is not None:
            raise UserError(f"{flag} is missing: a certificate and its key go together. Give both, or neither.")
    assert certificate is not None and key is not None
    return checked_authority(_read(certificate, "certificate"), certificate, _read(key, "key"), key)


def checked_authority(chain: bytes, chain_name: str, key: bytes, key_name: str) -> Authority:
    """The authority of two PEM texts. Raises UserError, saying which is wrong and why."""
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError:
        raise UserError(
            f"Certificate '{chain_name}' holds no readable PEM certificate. Give the whole chain, the signer's first."
        ) from None
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(
            f"Key '{key_name}' is no readable PEM private key without a password. Convert it with `openssl pkcs8 "
            "-topk8 -nocrypt`."
        ) from None
    leaf, now = certificates[0], dt.datetime.now(dt.UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        until = f"from {leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}"
        raise UserError(f"Certificate '{chain_name}' is valid {until} only, not now. Give one that is valid.")
    if _public(leaf.public_key()) != _public(private.public_key()):
        raise UserError(
            f"Key '{key_name}' is not the key of certificate '{chain_name}'. Give the key that "
            "the signer's certificate was made for, and put that certificate first in its file."
        )
    _check_usage(leaf, chain_name)
    return Authority(chain, key, _algorithm(private, key_name))


def _check_usage(leaf: x509.Certificate, name: str) -> None:
    try:
        authority = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        authority = False
    try:
        usages = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        usages = set()
    if authority or not usages:
        what = "is one of an authority" if authority else "has no extended key usage"
        raise UserError(
            f"Certificate '{name}' {what}; C2PA signs with an end certificate for document signing or e-mail "
            "protection. Put that certificate first in the file."
        )


def _algorithm(private: object, name: str) -> str:
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size >= 2048:
        return "ps256"
    raise UserError(
        f"Key '{name}' is of a kind that C2PA does not sign with. Use ECDSA (P-256, P-384, P-521), Ed25519, or RSA "
        "with at least 2048 bits."
    )


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"The {what} '{path}' cannot be read: {error.strerror or error}.") from None


def _public(key: object) -> bytes:
    der: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return der


def _make() -> bytes:
    """Key, leaf and root, in one PEM text."""
    root_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate("dreamfleet self-made root", root_key, root_key, root=True)
    leaf = _certificate("dreamfleet self-made signer", leaf_key, root_key, root=False)
    key = leaf_key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key + leaf.public_bytes(_PEM) + root.public_bytes(_PEM)


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: ec.EllipticCurvePrivateKey, *, root: bool
) -> x509.Certificate:
    now, public = dt.datetime.now(dt.UTC), key.public_key()
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name("dreamfleet self-made root"))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=365 * _YEARS))
        .add_extension(x509.BasicConstraints(ca=root, path_length=0 if root else None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not root, key_cert_sign=root, crl_sign=root, **usage), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
    )
    if not root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer, hashes.SHA256())


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "dreamfleet"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )
