"""The tracker's certificate authority: an EC P-256 key that signs the tracker's certificate and those of its agents.

Certificates are valid for one purpose: an agent's cannot serve, the tracker's cannot dial (TLS checks the extended key
usage), so no agent can take the tracker's place. They begin a day early, for clocks that are a little off.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kedge.rpc.security.files import SecretFileError, read_private, write_private
from kedge.rpc.transport import TRACKER_NAME

_DAY = datetime.timedelta(days=1)
_CA_LIFE = 7300 * _DAY
_TRACKER_LIFE = 3650 * _DAY
_EARLY = _DAY
#: No device can have this name.
PEER_NAME = "kedge tracker (peer)"


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its key, both PEM; `serial` names it, times are Unix seconds."""

    certificate: bytes
    key: bytes
    serial: str
    not_before_s: int
    not_after_s: int


def adopt(folder: Path, certificate_pem: bytes, key_pem: bytes) -> None:
    """Make another tracker's CA that of `folder`, which has none; raises SecretFileError."""
    write_private(folder / "ca.key", key_pem)
    write_private(folder / "ca.pem", certificate_pem)


class Authority:
    """The CA in `folder`: `ca.pem` and `ca.key`, made on first use."""

    def __init__(self, folder: Path, now_s: float) -> None:
        self._folder = folder
        try:
            self.certificate_pem = read_private(folder / "ca.pem")
            self._key = _load_key(read_private(folder / "ca.key"))
            self._certificate = x509.load_pem_x509_certificate(self.certificate_pem)
            if self._certificate.public_key() != self._key.public_key():
                raise SecretFileError(
                    f"{folder / 'ca.key'} is not the key of {folder / 'ca.pem'}", hint="restore both from one backup"
                )
        except FileNotFoundError:
            self._make(now_s)
        except ValueError as error:
            raise SecretFileError(f"the CA in {folder} is damaged: {error}", hint="restore it from a backup") from error

    def _make(self, now_s: float) -> None:
        left = [name for name in ("ca.pem", "ca.key") if (self._folder / name).exists()]
        if left:
            raise SecretFileError(
                f"{self._folder} has only {left[0]} of the CA: every device would be locked out by another one",
                hint="restore ca.pem and ca.key from a backup; remove both to begin anew",
            )
        self._key = ec.generate_private_key(ec.SECP256R1())
        begin = _moment(now_s) - _EARLY
        # The subject tells CAs apart: TLS then says that the issuer is unknown, not that its signature is wrong.
        name = _name(f"kedge CA {secrets.token_hex(4)}")
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self._certificate = (
            x509.CertificateBuilder(name, name, self._key.public_key(), x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + _CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate_pem = self._certificate.public_bytes(serialization.Encoding.PEM)
        write_private(self._folder / "ca.key", _pem(self._key))
        write_private(self._folder / "ca.pem", self.certificate_pem)

    @property
    def key_pem(self) -> bytes:
        """The CA's private key: for another tracker of the fleet."""
        return _pem(self._key)

    def peer(self, now_s: float) -> Issued:
        """A certificate with which this tracker dials the fleet's others, with a new key that is kept in memory."""
        return self._issue(PEER_NAME, ExtendedKeyUsageOID.CLIENT_AUTH, "peer.kedge", now_s, _TRACKER_LIFE)

    def tracker(self, now_s: float) -> Issued:
        """The tracker's own certificate, kept beside the CA; a new one where that is damaged or over its half."""
        try:
            certificate, key = (read_private(self._folder / name) for name in ("tracker.pem", "tracker.key"))
            known = _described(certificate, key)
            if known.not_before_s <= now_s < (known.not_before_s + known.not_after_s) / 2:
                return known
        except (FileNotFoundError, ValueError):
            pass  # made below, as on the first start
        issued = self._issue("kedge tracker", ExtendedKeyUsageOID.SERVER_AUTH, TRACKER_NAME, now_s, _TRACKER_LIFE)
        write_private(self._folder / "tracker.key", issued.key)
        write_private(self._folder / "tracker.pem", issued.certificate)
        return issued

    def device(self, name: str, now_s: float, life_s: float) -> Issued:
        """A certificate for the agent of a device, with a new key."""
        life = datetime.timedelta(seconds=life_s)
        return self._issue(name, ExtendedKeyUsageOID.CLIENT_AUTH, "device.kedge", now_s, life)

    def _issue(self, name: str, use: x509.ObjectIdentifier, dns: str, now_s: float, life: datetime.timedelta) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        begin = _moment(now_s)
        certificate = (
            x509.CertificateBuilder(
                self._certificate.subject, _name(name), key.public_key(), x509.random_serial_number()
            )
            .not_valid_before(begin - _EARLY)
            .not_valid_after(min(begin + life, self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _described(certificate.public_bytes(serialization.Encoding.PEM), _pem(key))


def serial_of(certificate_pem: bytes) -> tuple[str, int]:
    """A certificate's serial number in hexadecimal, and when it expires (Unix seconds)."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return f"{certificate.serial_number:x}", int(certificate.not_valid_after_utc.timestamp())


def described(certificate_pem: bytes) -> tuple[str, str, int]:
    """Whose a certificate is, its serial number in hexadecimal, and when it expires (Unix seconds)."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return (str(names[0].value) if names else "", *serial_of(certificate_pem))


def _described(certificate_pem: bytes, key: bytes) -> Issued:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    serial = f"{certificate.serial_number:x}"
    return Issued(certificate_pem, key, serial, int(begins.timestamp()), int(ends.timestamp()))


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("its key is not one of an elliptic curve")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _moment(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).replace(microsecond=0)
