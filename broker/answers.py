"""Answers kept for a time: the same request of the same tenant is computed once.

An answer lies under a digest of its request, beside a claim that says who computes it now. A claim
expires unless it is prolonged, so that one whose worker has died delays others by its life only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import redis
from redis.exceptions import RedisError

from broker import keys, scripts
from broker.connections import translate

#: Life of a claim that isn't prolonged (ms).
CLAIM_MS: Final = 10_000


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """Which answer: only its own tenant finds it."""

    tenant: str
    #: Hexadecimal, of everything that makes the answer what it is.
    digest: str

    @property
    def name(self) -> str:
        """Its key in Redis."""
        return keys.answer(self.tenant, self.digest)

    @property
    def claim(self) -> str:
        return keys.answer_claim(self.tenant, self.digest)


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: an answer, or who has to compute it."""

    answer: bytes | None = None
    #: There is no answer and the asker has the claim to it now.
    claimed: bool = False


class RedisAnswers:
    """Every call may raise `BrokerUnavailableError`. Thread-safe."""

    def __init__(self, client: redis.Redis, *, ttl_s: float, most: int) -> None:
        """`most`: answers kept of one tenant; the oldest go first."""
        self._ttl_ms = int(ttl_s * 1000)
        self._most = most
        # Untyped in redis-py.
        self._find: Any = client.register_script(scripts.ANSWER_FIND.source)
        self._keep: Any = client.register_script(scripts.ANSWER_KEEP.source)
        self._claim: Any = client.register_script(scripts.ANSWER_CLAIM.source)

    def find(self, key: AnswerKey, asker: str) -> Found:
        """The answer; where there is none and nobody computes it, the asker gets the claim."""
        reply = self._run(self._find, [key.name, key.claim], [asker, CLAIM_MS])
        return Found(reply[1]) if reply[0] == 1 else Found(claimed=reply[0] == 0)

    def keep(self, key: AnswerKey, asker: str, answer: bytes) -> None:
        """Keep an answer, and give up the claim to it."""
        names = [key.name, key.claim, keys.tenant_answers(key.tenant)]
        self._run(self._keep, names, [asker, answer, self._ttl_ms, self._most])

    def prolong(self, key: AnswerKey, asker: str) -> bool:
        """False when somebody else has the claim by now, or nobody."""
        return bool(self._run(self._claim, [key.claim], [asker, CLAIM_MS]))

    def release(self, key: AnswerKey, asker: str) -> None:
        """Give up a claim without an answer: somebody else may compute it."""
        self._run(self._claim, [key.claim], [asker, 0])

    @staticmethod
    def _run(script: Any, names: list[str], args: list[Any]) -> Any:
        try:
            return script(keys=names, args=args)
        except (RedisError, OSError) as error:
            raise translate(error) from error
