"""Certificates: a self-made one is made once, an operator's is checked, and what is wrong is said."""

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from serving.marking.authority import authority_of_files, own_authority
from serving.marking.credentials import Credentials, read_claim
from serving.marking.marks import Marks
from serving.marking.settings import MarkSpec
from training.errors import UserError
from training.storage.storage import open_storage


def files(folder: Path, chain: bytes, key: bytes) -> tuple[str, str]:
    certificate_file, key_file = folder / "chain.pem", folder / "key.pem"
    certificate_file.write_bytes(chain)
    key_file.write_bytes(key)
    return str(certificate_file), str(key_file)


@pytest.fixture
def own(tmp_path: Path) -> tuple[bytes, bytes]:
    authority = own_authority(open_storage(str(tmp_path / "own")))
    return authority.chain, authority.key


def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_the_self_made_chain_is_the_same_for_every_process(tmp_path: Path) -> None:
    one, other = (own_authority(open_storage(str(tmp_path))) for _ in range(2))
    assert one == other and one.algorithm == "es256"


def test_an_operators_certificate_signs(tmp_path: Path, own: tuple[bytes, bytes]) -> None:
    certificate, key = files(tmp_path, *own)
    signer = Credentials(authority_of_files(certificate, key), "ann")
    from serving.marking.credentials import _one_pixel

    data = signer.sign(_one_pixel(), "png", {"base": "b"}, "2026-01-01T00:00:00Z")
    assert read_claim(data, "png").state == "valid"
    assert read_claim(_one_pixel(), "png").state == "none"
    assert read_claim(data[:-30], "png").state == "invalid"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("missing", "cannot be read"),
        ("garbage", "holds no readable PEM certificate"),
        ("garbage key", "no readable PEM private key"),
        ("another key", "is not the key of certificate"),
        ("expired", "is valid from"),
        ("root first", "is one of an authority"),
        ("key only", "--certificate is missing"),
    ],
)
def test_what_is_wrong_with_certificates_stops_the_start(
    wrong: str, said: str, tmp_path: Path, own: tuple[bytes, bytes]
) -> None:
    chain, key = own
    if wrong == "garbage":
        chain = b"nothing"
    elif wrong == "garbage key":
        key = b"nothing"
    elif wrong == "another key":
        key = pem(ec.generate_private_key(ec.SECP256R1()))
    elif wrong == "expired":
        chain = expired(chain, key)
    elif wrong == "root first":
        leaf, root = x509.load_pem_x509_certificates(chain)
        chain = root.public_bytes(serialization.Encoding.PEM)
    certificate, key_file = files(tmp_path, chain, key)
    if wrong == "root first":
        return check_root(certificate, tmp_path)
    given = None if wrong == "key only" else str(tmp_path / "no.pem") if wrong == "missing" else certificate
    spec = MarkSpec(certificate=given, certificate_key=key_file)
    with pytest.raises(UserError, match=said) as raised:
        Marks(spec, open_storage(str(tmp_path / "s")))
    assert wrong == "key only" or "'" in str(raised.value)


def check_root(certificate: str, folder: Path) -> None:
    """An authority's own certificate, with its own key."""
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "root.pem").write_bytes(certificate_of(key, ca=True).public_bytes(serialization.Encoding.PEM))
    (folder / "root.key").write_bytes(pem(key))
    with pytest.raises(UserError, match="is one of an authority"):
        authority_of_files(str(folder / "root.pem"), str(folder / "root.key"))


def expired(chain: bytes, key: bytes) -> bytes:
    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return certificate_of(private, ca=False, days=-1).public_bytes(serialization.Encoding.PEM)


def certificate_of(key: ec.EllipticCurvePrivateKey, *, ca: bool, days: int = 5) -> x509.Certificate:
    from cryptography.hazmat.primitives import hashes

    now = dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=9))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
