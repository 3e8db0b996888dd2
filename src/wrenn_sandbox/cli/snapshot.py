"""`wrenn template snapshot`: a sandbox becomes a template."""

from typing import Annotated

import typer

from .account import open_client
from .output import print_json


def command(
    id: Annotated[str, typer.Argument(metavar="ID", help="A running sandbox; it ends with it.")],
    name: Annotated[str | None, typer.Option(help="The template's name; one is made up.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a template of that name.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")] = False,
) -> None:
    """Make a template of a running sandbox and print its name."""
    with open_client() as client:
        template = client.snapshots.create(id, name, overwrite=overwrite)
    if json:
        print_json(template)
    else:
        typer.echo(template.name)
