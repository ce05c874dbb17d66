"""One call of the queue: what is sent, and what the answer means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from broker.errors import BrokerUnavailableError
from broker.scripts import Script
from broker.wire import Arg

T = TypeVar("T")

#: Longest a write waits for its replicas.
REPLICAS_TIMEOUT_MS = 500


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """Commands sent in one go, and how their replies are read."""

    commands: tuple[tuple[Arg, ...], ...]
    #: Takes the replies and whether the commands were sent twice.
    decode: Callable[[list[Any], bool], T]
    #: The script that is the one command, if it is one.
    script: Script | None = None
    #: May be sent again when the connection broke before the answer came.
    repeatable: bool = True

    @property
    def by_source(self) -> tuple[tuple[Arg, ...], ...]:
        """The same with the script's source instead of its hash; also makes it known."""
        assert self.script is not None
        return (("EVAL", self.script.source, *self.commands[0][2:]), *self.commands[1:])


def script_call(
    script: Script,
    decode: Callable[[Any, bool], T],
    keys_: Sequence[Arg],
    *args: Arg,
    repeatable: bool = True,
) -> Call[T]:
    return Call(
        (("EVALSHA", script.sha, len(keys_), *keys_, *args),),
        lambda replies, repeated: decode(replies[0], repeated),
        script,
        repeatable,
    )


def replicated(call: Call[T], replicas: int) -> Call[T]:
    """The same, done when so many replicas have it.

    Where they don't within `REPLICAS_TIMEOUT_MS`, it raises `BrokerUnavailableError`, although the
    primary has done it: it isn't known whether it would outlive that primary.
    """

    def decode(replies: list[Any], repeated: bool) -> T:
        result = call.decode(replies[:-1], repeated)
        if int(replies[-1]) < replicas:
            raise BrokerUnavailableError("too few replicas have confirmed the write")
        return result

    wait = ("WAIT", replicas, REPLICAS_TIMEOUT_MS)
    return replace(call, commands=(*call.commands, wait), decode=decode)


def truth(reply: Any, _: bool) -> bool:
    return bool(reply)


def number(reply: Any, _: bool) -> int:
    return int(reply)


def nothing(_reply: Any, _: bool) -> None:
    return None
