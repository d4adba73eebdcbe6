"""Record IDs leave efface only as keyed hashes: truncated HMACs under the owner's key."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from efface.errors import MismatchError, WriteError

TAG_LENGTH = 16
"""Hexadecimal digits of a tag: 64 bits, enough to tell millions of records apart."""


def load_key() -> bytes:
    """The owner's key: ``EFFACE_KEY``, else the file ``EFFACE_KEY_FILE``, else one made for you.

    Without either, a random key is kept in ``~/.config/efface/key`` (mode 600), made when first
    needed. Whoever holds a model and the key can test whether a known ID was forgotten; without the
    key the tags say nothing. Losing the key means that later requests cannot be matched with
    earlier ones, so keep it with the data.

    Raises:
        MismatchError: If the key file cannot be read, or is empty.
        WriteError: If no key is set and none can be stored.
    """
    if text := os.environ.get("EFFACE_KEY"):
        return text.encode()
    if named := os.environ.get("EFFACE_KEY_FILE"):
        return _read_key(Path(named))
    try:
        config = os.environ.get("XDG_CONFIG_HOME")
        path = (Path(config) if config else Path.home() / ".config") / "efface" / "key"
        if not path.exists():
            _make_key(path)
    except (OSError, RuntimeError) as error:
        raise WriteError(
            "no key is set and none can be stored in your home folder; set EFFACE_KEY to a secret "
            f"text of your own ({error})."
        ) from None
    return _read_key(path)


def _make_key(path: Path) -> None:
    """Make a key file that only its owner may read; of two made at once, one wins for both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".key.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        os.write(handle, secrets.token_hex(32).encode())
        os.fsync(handle)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename, never replaces
    finally:
        os.close(handle)
        temporary.unlink()


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise MismatchError(
            f"the key file {path} cannot be read: {error.strerror}; correct EFFACE_KEY_FILE."
        ) from None
    if not key:
        raise MismatchError(f"the key file {path} is empty; put a secret text into it.")
    return key


def key_fingerprint(key: bytes) -> str:
    """What may be stored of a key: enough to recognise it, useless to forge with."""
    return hashlib.sha256(b"efface key fingerprint\0" + key).hexdigest()[:16]


def tags(ids: Iterable[str], key: bytes) -> list[str]:
    """Truncated HMAC-SHA256 of every ID, in the same order.

    >>> tags(["p017"], b"k") == tags(["p017"], b"k"), tags(["p017"], b"k") == tags(["p017"], b"K")
    (True, False)
    """
    return [
        hmac.new(key, record.encode(), hashlib.sha256).hexdigest()[:TAG_LENGTH] for record in ids
    ]
