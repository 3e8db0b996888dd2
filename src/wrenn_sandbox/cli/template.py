"""`wrenn template`: build the templates of this host and list them, make one of a sandbox."""

from pathlib import Path
from typing import Annotated

import typer

from . import snapshot

app = typer.Typer(
    help="Build and list the templates that sandboxes start from.", no_args_is_help=True
)
app.command("snapshot")(snapshot.command)


@app.command("build")
def build(
    name: Annotated[str, typer.Argument(help="Name that the template gets.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe file; without, the one that comes with the name.")
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(help="Package server, or a line of a sources list.")
    ] = None,
) -> None:
    """Build a template from its recipe; unchanged steps are not repeated."""
    # The host's side is slow to import, and only needed here.
    from . import host_templates

    host_templates.build(name, recipe, mirror)


@app.command("list")
def show(
    json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
) -> None:
    """List the templates of this host."""
    from . import host_templates

    host_templates.show(json)
