"""Keylime's credential blobs, made for tests: the counterpart of `credential.parse_challenge`."""

from __future__ import annotations

from provider_proxy.trust.registration.credential import MAGIC, VERSION


def encode_challenge(credential: bytes, secret: bytes) -> bytes:
    """The blob of the two structures, sizes included."""
    return MAGIC.to_bytes(4, "big") + VERSION.to_bytes(4, "big") + credential + secret
