"""The Lua library: one script per verb of the queue, with the shared functions it needs in front.

Scripts run by EVALSHA; a server that doesn't know one (a restart, SCRIPT FLUSH) gets the source by
EVAL, which also caches it. A script names its flags in its first line (`#!lua flags=…`): what puts
work or text in is refused as a whole when Redis is out of memory; what ends a job is not.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources

from broker.drain import FADING_MS
from broker.fairness import LEAST_TOKENS, MEMORY
from broker.forecast import RIVALS
from broker.jobs import BAND_SHARES, BANDS, STUB_S
from broker.limits import MINUTE_MS, TOLERANCE_MS
from broker.pace import PEAK_MEMORY
from broker.usage import HOUR_MS, KEPT_S
from broker.webhooks.outbox import MOST_EVENTS


@dataclass(frozen=True, slots=True)
class Script:
    name: str
    source: bytes
    #: Hexadecimal SHA-1 of the source, as EVALSHA wants it.
    sha: bytes


def _constants(script: str) -> str:
    """Those that the script names: tables would be made anew in each run."""
    names = ", ".join(f"'{band}'" for band in BANDS)
    shares = ", ".join(f"{band} = {share!r}" for band, share in BAND_SHARES.items())
    places = ", ".join(f"{band} = {n}" for n, band in enumerate(BANDS, 1))
    state = ", ".join(f"'{part}:{band}'" for part in ("V", "lag", "due") for band in BANDS)
    values = {
        "BANDS": f"{{{names}}}",
        "SHARE": f"{{{shares}}}",
        "PLACE": f"{{{places}}}",
        "STATE": f"{{{state}}}",
        "MEMORY": repr(MEMORY),
        "PEAK_MEMORY": repr(PEAK_MEMORY),
        "LEAST_TOKENS": repr(LEAST_TOKENS),
        "FADING_MS": repr(FADING_MS),
        "RIVALS": repr(RIVALS),
        "STUB_S": repr(STUB_S),
        "MINUTE_MS": repr(MINUTE_MS),
        "HOUR_MS": repr(HOUR_MS),
        "USAGE_S": repr(KEPT_S),
        "WEBHOOK_EVENTS": repr(MOST_EVENTS),
        "TOLERANCE_MS": repr(TOLERANCE_MS),
    }
    named = set(re.findall(r"[A-Z_]+", script))
    return "".join(f"local {name} = {value}\n" for name, value in values.items() if name in named)


#: Files that verbs share, each behind those whose functions it calls.
SHARED = ("_keys", "_race", "_limits", "_prelude", "_upkeep", "_intake")
#: Stands behind them for the verbs of webhooks.
SHARED_BY_WEBHOOKS = "_webhooks"

#: A shared function: its name and its whole text.
_FUNCTION = re.compile(r"^local function (\w+)\(.*?^end\n", re.MULTILINE | re.DOTALL)


def _needed(shared: str, verb: str) -> str:
    """The shared text without the functions that the verb doesn't use, directly or through others.

    Making them anew in each run would cost more than the shorter scripts themselves.
    """
    functions = {match[1]: match[0] for match in _FUNCTION.finditer(shared)}
    used: set[str] = set()
    texts = [verb]
    while texts:
        called = set(re.findall(r"(\w+)\(", texts.pop()))
        fresh = called & functions.keys() - used
        used |= fresh
        texts += (functions[name] for name in fresh)
    return _FUNCTION.sub(lambda match: match[0] if match[1] in used else "", shared)


def _load(name: str) -> Script:
    folder = resources.files("broker") / "lua"
    names = (*SHARED, SHARED_BY_WEBHOOKS) if name.startswith("webhook_") else SHARED
    shared = "\n".join((folder / f"{each}.lua").read_text(encoding="utf-8") for each in names)
    flags, _, verb = (folder / f"{name}.lua").read_text(encoding="utf-8").partition("\n")
    body = _needed(shared, verb) + verb
    source = f"{flags}\n{_constants(body)}{body}".encode()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


ENQUEUE = _load("enqueue")
CLAIM = _load("claim")
RENEW = _load("renew")
COMPLETE = _load("complete")
REQUEUE = _load("requeue")
RELEASE_OWNER = _load("release_owner")
CANCEL = _load("cancel")
ERASE = _load("erase")
RETRY = _load("retry")
DEAD_LETTERS = _load("dead_letters")
REPLAY_DEAD = _load("replay_dead")
PURGE_DEAD = _load("purge_dead")
EMIT = _load("emit")
SWEEP = _load("sweep")
COUNT_CLAIMABLE = _load("count_claimable")
SET_POLICY = _load("set_policy")
SET_MODE = _load("set_mode")
POSITION = _load("position")
LEASES = _load("leases")
STATS = _load("stats")
TENANT_QUEUE = _load("tenant_queue")
USAGE = _load("usage")
LIST_JOBS = _load("list_jobs")
OPEN_CONVERSATION = _load("open_conversation")
CONVERSE = _load("converse")
ANSWER_FIND = _load("answer_find")
ANSWER_KEEP = _load("answer_keep")
ANSWER_CLAIM = _load("answer_claim")
ANNOUNCE = _load("announce")
WEBHOOK_PUT = _load("webhook_put")
WEBHOOK_CLAIM = _load("webhook_claim")
WEBHOOK_RECORD = _load("webhook_record")
WEBHOOK_AGAIN = _load("webhook_again")
WEBHOOK_MIRROR = _load("webhook_mirror")

ALL: tuple[Script, ...] = (
    ENQUEUE,
    CLAIM,
    RENEW,
    COMPLETE,
    REQUEUE,
    RELEASE_OWNER,
    CANCEL,
    ERASE,
    RETRY,
    DEAD_LETTERS,
    REPLAY_DEAD,
    PURGE_DEAD,
    EMIT,
    SWEEP,
    COUNT_CLAIMABLE,
    SET_POLICY,
    SET_MODE,
    POSITION,
    LEASES,
    STATS,
    TENANT_QUEUE,
    USAGE,
    LIST_JOBS,
    OPEN_CONVERSATION,
    CONVERSE,
    ANSWER_FIND,
    ANSWER_KEEP,
    ANSWER_CLAIM,
    ANNOUNCE,
    WEBHOOK_PUT,
    WEBHOOK_CLAIM,
    WEBHOOK_RECORD,
    WEBHOOK_AGAIN,
    WEBHOOK_MIRROR,
)
