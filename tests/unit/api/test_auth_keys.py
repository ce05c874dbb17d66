"""The form of an API key."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.auth import keys


def test_a_new_key_has_form_checksum_and_a_short_prefix() -> None:
    secret = keys.generate("live")
    assert keys.has_form(secret.text)
    assert keys.has_checksum(secret.text)
    assert len(secret.text) == len("fb_live_") + 38
    assert secret.prefix == secret.text[: len("fb_live_") + 6]


def test_keys_differ_and_use_the_whole_alphabet() -> None:
    made = [keys.generate("test").text for _ in range(200)]
    assert len(set(made)) == 200
    seen = {character for key in made for character in key[len("fb_test_") :]}
    assert seen == set(string.digits + string.ascii_letters)


def test_the_checksum_is_the_documented_one() -> None:
    head = "fb_live_" + "0" * 32
    # CRC-32 by zlib, in base 62 with digits, upper case, lower case.
    assert keys.checksum(head) == "1XjS16"


@given(position=st.integers(0, 31), replacement=st.sampled_from(string.ascii_letters))
def test_any_changed_character_breaks_the_checksum(position: int, replacement: str) -> None:
    key = keys.generate("live").text
    index = len("fb_live_") + position
    changed = key[:index] + replacement + key[index + 1 :]
    assert keys.has_checksum(changed) == (changed == key)


def test_the_environment_is_part_of_the_checksum() -> None:
    key = keys.generate("live").text
    assert not keys.has_checksum(key.replace("fb_live_", "fb_test_"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fb_live_",
        "fb_LIVE_" + "a" * 38,
        "fb_live_" + "a" * 37,
        "fb_live_" + "a" * 39,
        "fb_live_" + "a" * 37 + "\n",
        "fb_live_" + "a" * 37 + "'",
        "fb_live_" + "a" * 37 + "é",
        "fb_live_" + "٣" * 38,
        "sk-" + "a" * 48,
    ],
)
def test_anything_else_lacks_the_form(text: str) -> None:
    assert not keys.has_form(text)


def test_a_secret_does_not_show_in_repr() -> None:
    secret = keys.generate("live")
    assert secret.text not in repr(secret)
    assert secret.text[-20:] not in repr(secret)


def test_digest_depends_on_pepper_and_key() -> None:
    key, other = keys.generate("live").text, keys.generate("live").text
    digests = {
        keys.digest(key, b"p" * 16),
        keys.digest(key, b"q" * 16),
        keys.digest(other, b"p" * 16),
    }
    assert len(digests) == 3
    assert all(len(digest) == 32 for digest in digests)
