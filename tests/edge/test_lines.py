"""Connections to guests that are kept between the requests of one client."""

import asyncio

import pytest

from support.ports import Edge, program


async def _polite(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_of_one_client_share_a_connection_to_the_guest(
    edge: Edge, sandbox: str
) -> None:
    async with program(_polite) as guest, edge.client() as client:
        host = {"Host": edge.host(sandbox, guest.port)}
        for _ in range(5):
            assert (await client.get("/", headers=host)).text == "hello"
        assert guest.connections == 1
