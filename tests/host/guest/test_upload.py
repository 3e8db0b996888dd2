"""Uploads to a guest: small pieces travel in few large chunks."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest

from wrenn_sandbox.host.guest.connection import UPLOAD_CHUNK, Connection


async def _chunks_sent(pieces: list[bytes]) -> list[bytes]:
    """What a guest gets as chunks when these pieces are uploaded."""
    chunks: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        while size := int(await reader.readline(), 16):
            chunks.append(await reader.readexactly(size))
            assert await reader.readexactly(2) == b"\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def source() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()

    async def connect() -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return sock

    async with server, asyncio.timeout(20):
        connection = await Connection.open(connect)
        try:
            await connection.upload("POST", "/files", {}, source())
            assert connection.status == 200
        finally:
            connection.close()
    return chunks


@pytest.mark.parametrize("size", [10_000, UPLOAD_CHUNK, UPLOAD_CHUNK + 1])
async def test_pieces_are_gathered(size: int) -> None:
    pieces = [os.urandom(size) for _ in range(3 * UPLOAD_CHUNK // size + 1)]
    chunks = await _chunks_sent(pieces)
    assert b"".join(chunks) == b"".join(pieces)
    assert all(UPLOAD_CHUNK <= len(chunk) < UPLOAD_CHUNK + size for chunk in chunks[:-1])


async def test_empty_pieces_do_not_end_the_body() -> None:
    assert await _chunks_sent([b"", b"a", b"", b"b"]) == [b"ab"]
    assert await _chunks_sent([]) == []
