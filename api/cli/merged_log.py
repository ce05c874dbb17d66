"""The children's lines on one stream, each with the name of its process in front."""

from __future__ import annotations

import io
import os
import queue
import sys
import threading

#: Bright enough on dark and light: cyan, green, yellow, blue, magenta.
_COLOURS = (36, 32, 33, 34, 35)
#: Lines that may wait for a slow reader before they are dropped.
_WAITING_LINES = 10_000
#: A longer line is cut into pieces.
_LONGEST_LINE_BYTES = 64 * 1024


class MergedLog:
    """Writes whole lines to a descriptor from a thread of its own.

    A reader that stands still (a pipe nobody empties, a stopped pager) never stops the writer's
    side: lines beyond the bound are dropped and counted.
    """

    def __init__(self, descriptor: int | None = None, *, colour: bool | None = None) -> None:
        self._descriptor = sys.stderr.fileno() if descriptor is None else descriptor
        self._colour = os.isatty(self._descriptor) if colour is None else colour
        self._lines: queue.Queue[bytes | None] = queue.Queue(_WAITING_LINES)
        self._dropped = 0
        self._names: dict[str, int] = {}
        #: Both sides add names: the writer's is that of the lines dropped.
        self._naming = threading.Lock()
        self._thread = threading.Thread(target=self._write, name="merged-log", daemon=True)
        self._thread.start()

    def say(self, name: str, line: str | bytes) -> None:
        """One line of the process `name`."""
        text = line.encode() if isinstance(line, str) else line
        try:
            self._lines.put_nowait(self._prefix(name) + text + b"\n")
        except queue.Full:
            self._dropped += 1

    def stream(self, name: str) -> io.TextIOBase:
        """A file that makes what is written to it lines of `name`."""
        return _Stream(self, name)

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what still waits, for a bounded time."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _prefix(self, name: str) -> bytes:
        # The widest name so far sets the column.
        with self._naming:
            number = self._names.setdefault(name, len(self._names))
            width = max(len(known) for known in self._names)
        label = f"{name:<{width}} | "
        if self._colour:
            label = f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{label}\x1b[0m"
        return label.encode()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                line = self._prefix("up") + f"{dropped} log lines dropped\n".encode() + line
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                # The reader is gone; the stack goes on without it.
                continue


class _Stream(io.TextIOBase):
    def __init__(self, log: MergedLog, name: str) -> None:
        self._log = log
        self._name = name

    def write(self, text: str, /) -> int:
        for line in text.splitlines():
            self._log.say(self._name, line)
        return len(text)


class LineSplitter:
    """Bytes in, whole lines out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) >= _LONGEST_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        return [line.rstrip(b"\r") for line in lines]

    def end(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return [rest] if rest else []
