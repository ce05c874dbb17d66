"""A RabbitMQ for tests and benchmarks: on free ports, in a folder of its own, gone with them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import kombu
from amqp.exceptions import NotFound

#: Debian's wrapper of this changes to another user; the script itself runs as anybody.
SCRIPT = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
PASSWORD = "s3cret-of-the-tests"
_START_S = 60.0


class RabbitMq:
    """One node, which can be killed and started again with what it kept on its disk."""

    def __init__(
        self,
        folder: Path,
        ports: tuple[int, int, int],
        *,
        tls: tuple[int, Path, Path] | None = None,
    ) -> None:
        """`tls`: a port for TLS, the certificate and its key."""
        port, distribution_port, epmd_port = ports
        self.url = f"amqp://guest:{PASSWORD}@127.0.0.1:{port}//"
        self._folder = folder
        self._environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "RABBITMQ_NODENAME": f"forebay-{secrets.token_hex(4)}@localhost",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            # Schedulers that wait asleep; there are few cores.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }
        (folder / "rabbitmq.conf").write_text(
            f"default_pass = {PASSWORD}\nvm_memory_high_watermark.absolute = 512MB\n"
            "disk_free_limit.absolute = 50MB\nlog.console = false\n"
        )
        if tls is not None:
            tls_port, certificate, key = tls
            self.certificate = certificate
            self.tls_url = f"amqps://guest:{PASSWORD}@127.0.0.1:{tls_port}//"
            with (folder / "rabbitmq.conf").open("a") as conf:
                conf.write(
                    f"listeners.ssl.default = 127.0.0.1:{tls_port}\n"
                    f"ssl_options.cacertfile = {certificate}\n"
                    f"ssl_options.certfile = {certificate}\nssl_options.keyfile = {key}\n"
                )
        (folder / "plugins").write_text("[].\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [str(SCRIPT)],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (self._folder / "output").read_text(errors="replace")
                raise RuntimeError(f"RabbitMQ did not start:\n{said[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        with suppress(OSError), kombu.Connection(self.url, connect_timeout=2) as connection:
            connection.connect()
            return True
        return False

    def kill(self) -> None:
        """At once, and all that belongs to it (the port mapper leaves the process group)."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            self._process = None

    def close(self) -> None:
        self.kill()
        subprocess.run(
            ["epmd", "-port", self._environment["ERL_EPMD_PORT"], "-kill"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )

    def tickets(self, queue: str) -> int:
        """How many wait; 0 also when there is no such queue."""
        with kombu.Connection(self.url) as connection:
            try:
                reply = connection.channel().queue_declare(queue, passive=True)
            except NotFound:
                return 0
            return int(reply.message_count)

    def purge(self, queue: str) -> int:
        """Lose the tickets that wait; returns how many."""
        with kombu.Connection(self.url) as connection:
            return int(connection.channel().queue_purge(queue))
