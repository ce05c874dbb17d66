"""The Lua sources as they are put together."""

from __future__ import annotations

import hashlib
import re
from importlib import resources

import pytest

from broker import scripts
from broker.jobs import BAND_SHARES
from broker.scripts import ALL, SHARED, SHARED_BY_WEBHOOKS, Script

FOLDER = resources.files("broker") / "lua"


def _shared(name: str) -> str:
    return (FOLDER / f"{name}.lua").read_text()


def test_every_file_is_a_script() -> None:
    files = {entry.name for entry in FOLDER.iterdir()}
    names = (*SHARED, SHARED_BY_WEBHOOKS, *(script.name for script in ALL))
    assert files == {f"{name}.lua" for name in names}


def test_a_shared_function_stands_behind_those_it_calls() -> None:
    """Lua takes a local name that comes later for a global one, and finds nil."""
    text = "".join(_shared(name) for name in (*SHARED, SHARED_BY_WEBHOOKS))
    functions = dict(
        re.findall(r"^local function (\w+)(\(.*?^end\n)", text, re.MULTILINE | re.DOTALL)
    )
    known: set[str] = set()
    for name, body in functions.items():
        known.add(name)
        called = set(re.findall(r"(\w+)\(", body)) & functions.keys()
        assert called <= known, f"{name} calls {called - known}"


@pytest.mark.parametrize("script", ALL, ids=lambda script: script.name)
def test_a_script_is_whole(script: Script) -> None:
    source = script.source.decode()
    assert source.startswith("#!lua")
    assert script.sha == hashlib.sha1(script.source).hexdigest().encode()
    defined = set(re.findall(r"local function (\w+)\(", source))
    text = "".join(_shared(name) for name in (*SHARED, SHARED_BY_WEBHOOKS))
    shared = set(re.findall(r"local function (\w+)\(", text))
    called = set(re.findall(r"(\w+)\(", source)) & shared
    assert called <= defined


@pytest.mark.parametrize("script", ALL, ids=lambda script: script.name)
def test_a_script_names_its_keys_and_arguments(script: Script) -> None:
    text = (FOLDER / f"{script.name}.lua").read_text()
    header = text[: text.index("\n\n")]
    for kind, number in re.findall(r"(KEYS|ARGV)\[(\d+)\]", text):
        assert re.search(rf"{kind}\[{number}|\[{number}\]|\[\d…{number}\]", header) or (
            f"{kind}[" in header and "…" in header
        ), f"{kind}[{number}]"


def test_scripts_carry_only_what_they_use() -> None:
    assert b"local function give_back" not in scripts.RENEW.source
    assert b"local function read_lease" in scripts.RENEW.source
    assert b"local function give_back" in scripts.CLAIM.source


def test_shares_come_from_the_house() -> None:
    for band, share in BAND_SHARES.items():
        assert f"{band} = {share!r}".encode() in scripts.CLAIM.source


#: What puts work in is refused as a whole when memory is short.
PUT_IN = (
    scripts.ENQUEUE,
    scripts.RETRY,
    scripts.REPLAY_DEAD,
    scripts.OPEN_CONVERSATION,
    scripts.CONVERSE,
    scripts.ANSWER_FIND,
    scripts.ANSWER_KEEP,
    scripts.WEBHOOK_PUT,
    scripts.WEBHOOK_AGAIN,
    scripts.WEBHOOK_MIRROR,
)


def test_what_ends_a_job_runs_when_memory_is_short() -> None:
    for script in ALL:
        flags = script.source.split(b"\n", 1)[0]
        # A streaming job's last text goes out before its end.
        if script in PUT_IN:
            assert flags == b"#!lua"
        else:
            assert flags in (b"#!lua flags=allow-oom", b"#!lua flags=no-writes")
