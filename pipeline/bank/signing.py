"""Signatures of manifests: Ed25519 over the manifest's digest, by keys in PEM files.

Optional, and imported only when a key is given. A bank opened with trusted keys refuses every manifest
that none of them signed. Make a pair with OpenSSL: `openssl genpkey -algorithm ed25519 -out bank.key`
and `openssl pkey -in bank.key -pubout -out bank.pub`.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.bank.sealed import Seal, Signature
from pipeline.errors import BankError

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
except ImportError as missing:
    raise BankError("signatures need one more package: pip install 'promptbank[signing]'") from missing

_MEANING = b"prompt bank manifest, format 1\n"
_MAX_KEY_BYTES = 2**16


def load_signing_key(path: str | Path, trusted: Sequence[str] = ()) -> Callable[[str], Signature]:
    """A function that signs digests with the private key in a PEM file.

    Raises: BankError for another kind of file, or when keys are trusted and this one is not among them.
    """
    data = _read(path)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BankError(f"{path} is not a private key in PEM without a password") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BankError(f"{path} is not an Ed25519 key; make one with: openssl genpkey -algorithm ed25519")
    public = key.public_key().public_bytes_raw().hex()
    if trusted and public not in trusted:
        raise BankError(f"the signing key {path} is not among the trusted keys; readers would refuse what it signs")
    return lambda digest: Signature(base64.b64encode(key.sign(_message(digest))).decode(), public)


def load_trusted_keys(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Public keys in PEM files, as 64 hex digits each. Raises: BankError."""
    return tuple(map(_load_public_key, paths))


def check_signature(seal: Seal, trusted: Sequence[str], where: str) -> None:
    """Check that one of the trusted keys signed. Raises: BankError."""
    if seal.signature is None:
        raise BankError(f"{where} is refused: it is not signed, and this bank is opened with trusted keys")
    if seal.signature.key not in trusted:
        raise BankError(f"{where} is refused: it is signed by the key {seal.signature.key}, which is not trusted")
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(seal.signature.key))
    try:
        public.verify(base64.b64decode(seal.signature.ed25519), _message(seal.digest))
    except InvalidSignature as error:
        raise BankError(f"{where} is refused: its signature is wrong") from error


def _load_public_key(path: str | Path) -> str:
    data = _read(path)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BankError(f"{path} is not a public key in PEM; write one with: openssl pkey -pubout") from error
    if not isinstance(key, Ed25519PublicKey):
        raise BankError(f"{path} is not an Ed25519 public key; make one with: openssl genpkey -algorithm ed25519")
    return key.public_bytes_raw().hex()


def _message(digest: str) -> bytes:
    return _MEANING + digest.encode()


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).expanduser().open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise BankError(f"cannot read the key {path}: {error.strerror}; fix the path") from error
