"""`wrenn serve`."""

import asyncio
import contextlib
import faulthandler
from typing import Annotated

import typer
import uvloop

from wrenn_sandbox.settings import ServiceSettings, Settings


def command(
    host: Annotated[str | None, typer.Option(help="Address to listen on (WRENN_HOST).")] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on, 0 for any free one (WRENN_PORT).", min=0, max=65535),
    ] = None,
    build: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Build this template first, from its recipe (repeatable)."
        ),
    ] = None,
) -> None:
    """Serve the API until interrupted. Machines keep running (or are paused: WRENN_ON_STOP)."""
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = Settings(**given)  # type: ignore[arg-type]
    service = ServiceSettings()
    # Half a second of imports that no other command needs.
    from wrenn_sandbox import logs
    from wrenn_sandbox.server.main import check_address, run

    if build:
        from . import host_templates

        check_address(settings)
        for name in build:
            host_templates.build(name, None, None)
    faulthandler.enable()
    logs.configure(settings, journal_stream=service.journal_stream)

    with contextlib.suppress(asyncio.CancelledError):
        uvloop.run(run(settings, service))
