"""`python -m loadtests.cut_proxy LISTEN TARGET`: a TCP proxy between two ports of the loopback.

Stands in for haproxy where that isn't installed. To cut all connections, kill it. A test that runs
it itself can also make the network behind it slow, or let nothing through for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

_CHUNK = 65_536


class Network:
    """What all bytes of a proxy go through, in both directions; belongs to its event loop."""

    def __init__(self) -> None:
        #: Each piece takes this long on its way (s).
        self.delay_s = 0.0
        self._open = asyncio.Event()
        self._open.set()

    def stall(self) -> None:
        """From now on bytes get stuck on their way. Connections stay, and new ones are taken."""
        self._open.clear()

    def flow(self) -> None:
        """What got stuck arrives."""
        self._open.set()

    async def carry(self) -> None:
        """The way of one piece of bytes."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._open.wait()


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, network: Network
) -> None:
    """Until either side is gone, which ends the other direction as well."""
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        while chunk := await reader.read(_CHUNK):
            await network.carry()
            writer.write(chunk)
            await writer.drain()


async def serve(listen: int, target: int, network: Network) -> None:
    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, thither = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, thither, network), _copy(there, writer, network))

    server = await asyncio.start_server(join, "127.0.0.1", listen)
    async with server:
        await server.serve_forever()


async def _main(listen: int, target: int) -> None:
    await serve(listen, target, Network())


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))
