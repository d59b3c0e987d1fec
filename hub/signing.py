"""Signed values that come back from a browser or a client: sessions, upload links."""

import hashlib
import hmac
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

from itsdangerous import BadSignature, URLSafeTimedSerializer

from hub.blobs import durable


class Signer:
    """Signs JSON values for one purpose each, so that none can stand in for another."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def sign(self, purpose: str, value: Any) -> str:
        """ASCII that is safe in a URL, a header and a cookie; it is readable, not secret."""
        signed = self._serializer(purpose).dumps(value)
        return signed if isinstance(signed, str) else signed.decode()

    def unsign(self, purpose: str, text: str, max_age_s: int) -> Any | None:
        """The value, or None if the text was changed, is too old or has another purpose."""
        found = self.unsign_dated(purpose, text, max_age_s)
        return found[0] if found is not None else None

    def unsign_dated(self, purpose: str, text: str, max_age_s: int) -> tuple[Any, datetime] | None:
        """As `unsign`, with the second in which it was signed."""
        serializer = self._serializer(purpose)
        try:
            value, signed_at = serializer.loads(text, max_age=max_age_s, return_timestamp=True)
        except BadSignature:
            return None
        assert isinstance(signed_at, datetime)
        return value, signed_at

    def seal(self, purpose: str, content: bytes) -> str:
        """Hexadecimal digits that only this hub can make for these bytes, for ever."""
        key = hashlib.sha256(f"{purpose}\0{self._secret}".encode()).digest()
        return hmac.new(key, content, hashlib.sha256).hexdigest()

    def _serializer(self, purpose: str) -> URLSafeTimedSerializer:
        return URLSafeTimedSerializer(self._secret, salt=purpose)


def secret_in(path: Path) -> str:
    """The secret kept in a file with mode 0600, made on first use."""
    if not path.exists():
        write_secret(path, secrets.token_urlsafe(32))
    return path.read_text().strip()


def write_secret(path: Path, secret: str) -> None:
    """Whole or not at all, and readable by its owner only."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = durable.create_exclusive(temporary)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(secret + "\n")
        file.flush()
        durable.sync_file(file.fileno())
    temporary.replace(path)
    durable.sync_folder(path.parent)
