"""The form of an API key: `fb_<env>_<32 random base 62 characters><6 of CRC-32>`.

32 characters carry 190 random bits. The checksum covers all that precedes it, so that a typo or a
blind guess is refused without any lookup; it proves nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM_LENGTH = 32
#: 62**6 > 2**32.
_CHECKSUM_LENGTH = 6
#: Random characters shown of a key; the 26 that stay hidden carry 154 bits.
_SHOWN = 6
_FORM = re.compile(r"fb_[a-z]{2,10}_[0-9A-Za-z]{38}", re.ASCII)

#: No API key is longer.
MAX_LENGTH = len("fb_") + 10 + len("_") + _RANDOM_LENGTH + _CHECKSUM_LENGTH


@dataclass(frozen=True, slots=True)
class NewSecret:
    """A key just made. The text is shown to its owner once and stored nowhere."""

    text: str = field(repr=False)

    @property
    def prefix(self) -> str:
        """Enough to recognise the key in a list, not enough to guess it."""
        return prefix(self.text)


def generate(env: str) -> NewSecret:
    """A new random key for the given environment name (`auth.key_env`)."""
    head = f"fb_{env}_" + "".join(secrets.choice(_BASE62) for _ in range(_RANDOM_LENGTH))
    return NewSecret(head + checksum(head))


def checksum(head: str) -> str:
    """CRC-32 of the key's first part, as 6 base 62 digits."""
    number = zlib.crc32(head.encode("ascii"))
    digits = []
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


def has_form(key: str) -> bool:
    """Whether the text could be a key at all; looks at no more than its length when too long."""
    return len(key) <= MAX_LENGTH and _FORM.fullmatch(key) is not None


def has_checksum(key: str) -> bool:
    """Whether the last characters of a text with the right form are its checksum."""
    head, tail = key[:-_CHECKSUM_LENGTH], key[-_CHECKSUM_LENGTH:]
    return hmac.compare_digest(checksum(head), tail)


def prefix(key: str) -> str:
    return key[: len(key) - _RANDOM_LENGTH - _CHECKSUM_LENGTH + _SHOWN]


def digest(key: str, pepper: bytes) -> bytes:
    """What is stored in place of the key: HMAC-SHA256(pepper, key), 32 bytes.

    A stolen table verifies nothing without the pepper, which lives outside the database. A slow
    hash would add nothing: the key is random, not chosen by a person.
    """
    return hmac.digest(pepper, key.encode("ascii"), hashlib.sha256)
