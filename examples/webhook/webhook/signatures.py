"""Who sent it, when, and whether it is what was sent."""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping

import msgspec

from harperpy import ClientError, ConfigError, Secret

LONGEST_ID = 256


class Signed(msgspec.Struct, frozen=True):
    """The three headers of an event."""

    id: str
    timestamp: int
    signatures: list[bytes]


class Verifier:
    """Holds the secret that the sender signs with: `whsec_` and the key in base64."""

    def __init__(self, secret: Secret, tolerance: int) -> None:
        self.tolerance = tolerance
        try:
            key = base64.b64decode(secret.reveal().removeprefix("whsec_"), validate=True)
        except binascii.Error as error:
            message = "WEBHOOK_SECRET: expected 'whsec_' and a key in base64"
            raise ConfigError(message) from error
        self._key = key

    def verify(self, headers: Mapping[str, str], body: bytes) -> str:
        """The event's id. Raises 400 for headers that are no signature, 401 for a wrong one."""
        signed = read(headers)
        text = b"%b.%d.%b" % (signed.id.encode(), signed.timestamp, body)
        digest = hmac.new(self._key, text, hashlib.sha256).digest()
        expected = b"v1," + base64.b64encode(digest)
        # All of them, each in constant time: during a change of keys there are several.
        right = [hmac.compare_digest(expected, one) for one in signed.signatures]
        if not any(right):
            message = "webhook-signature: does not fit this body"
            raise ClientError(message, status=401, code="wrong_signature")
        # An old event with its right signature is one that somebody has recorded.
        if abs(time.time() - signed.timestamp) > self.tolerance:
            message = f"webhook-timestamp: expected one within {self.tolerance} s of now"
            raise ClientError(message, code="too_old", param="webhook-timestamp")
        return signed.id


def read(headers: Mapping[str, str]) -> Signed:
    # As sent, were it no text at all.
    signatures = headers.get("webhook-signature", "").encode(errors="surrogateescape").split()
    if not signatures:
        message = "webhook-signature: expected one"
        raise ClientError(message, status=401, code="missing_signature")
    name = headers.get("webhook-id", "")
    if not (name and name.isascii() and len(name) <= LONGEST_ID):
        message = f"webhook-id: expected one of at most {LONGEST_ID} ASCII characters"
        raise ClientError(message, param="webhook-id")
    timestamp = headers.get("webhook-timestamp", "")
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        message = "webhook-timestamp: expected seconds since 1970"
        raise ClientError(message, param="webhook-timestamp")
    return Signed(name, int(timestamp), signatures)
