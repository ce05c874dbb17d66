"""`python -m loadtests.cut_proxy LISTEN TARGET`: a TCP proxy between two ports of the loopback.

Stands in for haproxy where that isn't installed. To cut all connections, kill it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

_CHUNK = 65_536


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until either side is gone, which ends the other direction as well."""
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()


async def serve(listen: int, target: int) -> None:
    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, thither = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, thither), _copy(there, writer))

    server = await asyncio.start_server(join, "127.0.0.1", listen)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
