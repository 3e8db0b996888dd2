"""TLS of a guest's connection, passed on as it is to the host that its first message names."""

from typing import Final

from .connection import Connection, Denied, Unreachable
from .hello import ClientHello, NoHello
from .names import known

PORT: Final = 443


async def serve(connection: Connection) -> None:
    """Serve a connection to its end. Raises OSError."""
    hello = ClientHello()
    try:
        while not hello.take(await connection.receive(connection.near)):
            pass
    except NoHello:
        return
    name = known(hello.name or "")
    try:
        if name is not None:
            await connection.dial(name, PORT)
            await connection.pump(from_near=hello.data)
            return
    except (Denied, Unreachable):
        pass
    await connection.send(connection.near, hello.alert)
