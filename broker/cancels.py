"""News of cancels for a worker, the moment they are wanted.

Pub/sub promises nothing; what isn't heard here, the next renewal of the lease brings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import redis
from redis.exceptions import RedisError

from broker import keys
from config.logs import get_logger

log = get_logger(__name__)

#: Longest time until the thread sees that it shall end (s).
_LOOK_S = 0.5
#: Pause before it connects again (s).
_RETRY_S = 1.0


class CancelListener:
    """Tells of each running job of a queue that somebody wants stopped, by its id.

    It has a thread and a connection of its own, and connects again by itself. `on_cancel` hears of
    the jobs of other workers too.
    """

    def __init__(
        self, client: redis.Redis, queue_name: str, on_cancel: Callable[[str], object]
    ) -> None:
        # Its pub/sub is untyped in redis-py.
        self._client: Any = client
        self._channel = keys.cancels(queue_name)
        self._on_cancel = on_cancel
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cancels", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            # Longer only in the middle of a broken connection; the thread doesn't hold the process.
            self._thread.join(2 * _LOOK_S)

    def _run(self) -> None:
        lost = False
        while not self._stopping.is_set():
            try:
                with self._client.pubsub() as subscription:
                    subscription.subscribe(self._channel)
                    while not self._stopping.is_set():
                        message = subscription.get_message(timeout=_LOOK_S)
                        if message is None:
                            continue
                        if message["type"] == "message":
                            self._on_cancel(message["data"].decode())
                        elif lost:
                            lost = False
                            log.info("cancel_news_found")
            except (RedisError, OSError) as error:
                if not lost:
                    lost = True
                    log.warning("cancel_news_lost", error=str(error))
                self._stopping.wait(_RETRY_S)
