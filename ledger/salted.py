"""Hashes that name a text only to who has its salt.

Each request has a salt of its own, kept with its text and deleted with it: what the ledger then holds can be matched
with nothing, not by trying all names of a country either.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


def new_salt() -> str:
    """Return 32 random bytes as hex."""
    return secrets.token_hex(32)


def salted(text: str, salt: str) -> str:
    """Return HMAC-SHA256 of a text under a salt, as hex (RFC 2104)."""
    return hmac.new(bytes.fromhex(salt), text.encode(), hashlib.sha256).hexdigest()
