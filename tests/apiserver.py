"""The API on a real socket, with accounts and a worker made for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from api.accounts import schema
from api.accounts.database import make_engine
from api.accounts.records import Tenant
from api.accounts.store import AccountStore
from api.app import make_app
from api.auth.errors import AuthenticationError, Reason
from api.auth.principal import Principal
from api.protocol import ApiRunner
from broker.async_queue import AsyncRedisQueue
from broker.connections import connect, connect_async
from broker.conversations import MemoryConversations, RedisConversations
from broker.errors import BrokerUnavailableError
from broker.jobs import Claim, Delta, JobError, Outcome, Status, Usage
from broker.policies import TenantPolicy
from broker.queue import JobQueue
from broker.redis_queue import RedisQueue
from broker.results import EventHub
from broker.stats import WorkerStatus
from config import catalogue
from config.catalogue import ModelSpec
from config.settings import Settings
from tests.conftest import PATIENCE_S
from workers.engine import EngineResult, Judgement
from workers.responses import response_body

CHAT = "smollm2-135m"
EMBED = "all-minilm-l6-v2"
MODELS = catalogue.load()
MODERATOR = "moderator"
RERANKER = "reranker"
#: With models of the kinds that the shipped catalogue has none of.
ALL_KINDS = MODELS | {
    name: ModelSpec.model_validate(
        {"name": name, "kind": kind, "source": "path:/nowhere", "context_tokens": 64}
    )
    for name, kind in ((MODERATOR, "classifier"), (RERANKER, "reranker"))
}
OWNER = "test-worker"


class Accounts:
    """Three keys: `Bearer a` and `Bearer b` of two tenants, `Bearer admin` of an operator."""

    def __init__(self) -> None:
        self._principals = {
            f"Bearer {name}": Principal(
                tenant=f"ten_{name}",
                tenant_name=name,
                key_id=f"key_{name}",
                scopes=frozenset(scopes),
                policy=TenantPolicy(),
            )
            for name, scopes in {"a": {"jobs"}, "b": {"jobs"}, "admin": {"admin"}}.items()
        }

    def change(self, name: str, **fields: Any) -> None:
        """Give the principal of a key another policy or other limits."""
        key = f"Bearer {name}"
        self._principals[key] = replace(self._principals[key], **fields)

    def authenticate(self, authorization: str | None) -> Principal:
        if not authorization:
            raise AuthenticationError(Reason.MISSING)
        try:
            return self._principals[authorization]
        except KeyError:
            raise AuthenticationError(Reason.UNKNOWN_KEY) from None


class Noticed:
    """An asynchronous queue whose enqueues and cancels wake the test's worker."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.bell = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def enqueue(self, job: Any) -> Any:
        try:
            return await self._inner.enqueue(job)
        finally:
            self.bell.set()

    async def cancel(self, *args: Any, **more: Any) -> Any:
        try:
            return await self._inner.cancel(*args, **more)
        finally:
            self.bell.set()


class Worker:
    """Answers every chat with what was asked, word by word. Prompts steer it:

    `fail <code>` fails with that code, `bury <code>` also leaves a dead letter, `hold` says one
    word and runs until it is cancelled (or `release`d), `crash` loses its first attempt after a
    word, `diverge` also says something else at the second.
    """

    def __init__(self, queue: JobQueue, bell: asyncio.Event) -> None:
        self._queue = queue
        self._bell = bell
        self.held: list[Claim] = []
        #: Set whenever a job is held.
        self.holding = asyncio.Event()

    async def run(self) -> None:
        while True:
            await self._bell.wait()
            self._bell.clear()
            # Tests take the queue away; the bell rings again when it is back.
            with suppress(BrokerUnavailableError):
                await self._work_all()

    async def _work_all(self) -> None:
        self.check_cancelled()
        for model in ALL_KINDS:
            while claims := self._queue.claim(model, OWNER):
                self._work(claims[0])
                # Let readers see what was published.
                await asyncio.sleep(0)

    def ring(self) -> None:
        """Have a look: time has passed."""
        self._bell.set()

    def check_cancelled(self) -> None:
        for claim in list(self.held):
            states = self._queue.renew(claim.queue, OWNER, [(claim.job.id, claim.attempt)])
            if states[claim.job.id] == "cancel":
                self.held.remove(claim)
                self._queue.complete(claim, Outcome(status=Status.CANCELLED, usage=usage(1)))

    def release(self) -> None:
        """Finish all held jobs."""
        while self.held:
            claim = self.held.pop()
            self._finish(claim, "held to the end")

    def _work(self, claim: Claim) -> None:
        body = orjson.loads(claim.job.body)
        if claim.job.endpoint == "/v1/embeddings":
            vectors = [{"object": "embedding", "index": index, "embedding": [float(index), 0.5]}
                       for index, _ in enumerate(body["input"])]  # fmt: skip
            output = {"object": "list", "data": vectors, "model": EMBED,
                      "usage": {"prompt_tokens": 3, "total_tokens": 3}}  # fmt: skip
            self._complete(claim, output)
            return
        if claim.job.endpoint in ("/v1/moderations", "/v1/rerank"):
            self._judge(claim, body)
            return
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        command, _, rest = str(prompt).partition(" ")
        if command == "fail":
            error = JobError(code=rest, message="It was asked to fail.", param="messages")
            self._queue.complete(claim, Outcome(status=Status.FAILED, error=error))
        elif command == "bury":
            self._queue.bury(claim, rest, "It was given up.")
        elif command == "hold":
            self._say(claim, "held ")
            self.held.append(claim)
            self.holding.set()
        elif command in ("crash", "diverge") and claim.attempt == 1:
            self._say(claim, "one ")
            self._queue.requeue(claim)
        else:
            text = "two three" if command == "diverge" else "one two three"
            for word in ("one ", "two ", "three") if text[0] == "o" else ("two ", "three"):
                self._say(claim, word)
            self._finish(claim, text)

    def _judge(self, claim: Claim, body: dict[str, Any]) -> None:
        """Texts with `bad` in them are bad, and documents as relevant as they are long."""
        scores = [0.9 if "bad" in text else 0.1 for text in body.get("input", ())]
        result = EngineResult(
            judgements=[Judgement({"bad": score}, {"bad": score > 0.5}) for score in scores],
            relevance=[len(text) / 100 for text in body.get("documents", ())],
            usage=usage(0),
        )
        output = response_body(claim.job, body, result)
        outcome = Outcome(status=Status.COMPLETED, output=output, usage=usage(0))
        self._queue.complete(claim, outcome)

    def _say(self, claim: Claim, text: str) -> None:
        if claim.job.stream:
            self._queue.emit(
                claim.queue, [Delta(job_id=claim.job.id, attempt=claim.attempt, text=text)]
            )

    def _finish(self, claim: Claim, text: str) -> None:
        chat = claim.job.endpoint in ("/v1/chat/completions", "/v1/responses")
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "stop"}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        output = {
            "id": ("chatcmpl-" if chat else "cmpl-") + claim.job.id.removeprefix("job_"),
            "object": "chat.completion" if chat else "text_completion",
            "created": claim.job.created_ms // 1000,
            "model": claim.job.model,
            "choices": [choice],
            "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
            "system_fingerprint": "simulated",
        }
        self._complete(claim, output)

    def _complete(self, claim: Claim, output: dict[str, Any]) -> None:
        self._queue.complete(
            claim,
            Outcome(status=Status.COMPLETED, output=orjson.dumps(output), usage=usage(3)),
        )


def usage(output_tokens: int) -> Usage:
    return Usage(input_tokens=5, output_tokens=output_tokens)


def ready_worker(model: str, state: str = "ready") -> WorkerStatus:
    return WorkerStatus(
        owner=f"{OWNER}:{model}",
        queue=model,
        hostname="here",
        pid=1,
        engine="simulated",
        state=state,
        capacity=1,
        jobs=0,
        steps=0,
        started_ms=0,
        seen_ms=0,
    )


class _Server(TestServer):
    """Runs the application as `python -m api` does."""

    async def _make_runner(self, **options: Any) -> web.BaseRunner:
        return ApiRunner(self.app, **options)


@dataclass
class Api:
    """A running API and what stands behind it."""

    client: TestClient[web.Request, web.Application]
    queue: JobQueue
    worker: Worker
    app: web.Application
    accounts: Accounts

    @property
    def url(self) -> str:
        return str(self.client.make_url("/"))


@asynccontextmanager
async def serving(
    settings: Settings,
    queue: JobQueue,
    async_queue: Any,
    hub: Any,
    *,
    key: str = "a",
    conversations: Any = None,
    storage: bool = False,
    webhooks: Any = None,
    models: Mapping[str, ModelSpec] = MODELS,
) -> AsyncIterator[Api]:
    noticed = Noticed(async_queue)
    accounts = Accounts()
    app = make_app(
        settings,
        models,
        queue=noticed,
        hub=hub,
        authenticator=accounts,
        conversations=conversations or MemoryConversations(most=settings.api.max_conversations),
        storage=storage,
        webhooks=webhooks,
    )
    worker = Worker(queue, noticed.bell)
    working = asyncio.create_task(worker.run())
    server = _Server(app)
    try:
        async with TestClient(server, headers={"Authorization": f"Bearer {key}"}) as client:
            yield Api(client=client, queue=queue, worker=worker, app=app, accounts=accounts)
    finally:
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working


def make_database(settings: Settings) -> None:
    """The accounts database with the tenants of `Accounts`; files and batches refer to them."""
    engine = make_engine(settings.database)
    schema.upgrade(engine)
    now = datetime.now(UTC)
    for name in ("a", "b"):
        tenant = Tenant(
            id=f"ten_{name}", name=name, policy=TenantPolicy(), created_at=now, updated_at=now
        )
        AccountStore(engine).add_tenant(tenant)
    engine.dispose()


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    storage: bool = False,
    webhooks: Any = None,
    models: Mapping[str, ModelSpec] = MODELS,
) -> AsyncIterator[Api]:
    """The API on a real server."""
    client = connect(settings.redis)
    async with connect_async(settings.redis) as async_client:
        hub = EventHub(async_client)
        await hub.start()
        queue = AsyncRedisQueue(async_client, settings.queue)
        async with serving(
            settings,
            RedisQueue(client, settings.queue),
            queue,
            hub,
            conversations=RedisConversations(
                async_client, ttl_s=60, most=settings.api.max_conversations
            ),
            storage=storage,
            webhooks=webhooks,
            models=models,
        ) as api:
            yield api
        await hub.stop()
    client.close()


async def eventually(check: Callable[[], Any], *, within_s: float = PATIENCE_S) -> Any:
    """The first true value of `check`, for things that happen in another task."""
    async with asyncio.timeout(within_s):
        while not (value := check()):
            await asyncio.sleep(0.005)
    return value


def chat(text: str = "hi", **changes: Any) -> dict[str, Any]:
    return {"model": CHAT, "messages": [{"role": "user", "content": text}], **changes}


def job(text: str = "hi", *, body: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {"endpoint": "/v1/chat/completions", "body": chat(text, **(body or {})), **changes}
