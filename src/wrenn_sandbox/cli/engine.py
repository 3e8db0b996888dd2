"""`wrenn engine`: the VMMs that this host keeps for what they have stored."""

from typing import Annotated

import typer

app = typer.Typer(
    help="The VMMs that this host keeps for what they have stored.", no_args_is_help=True
)


# Both import the host's modules, which takes as long as all that other commands need.
@app.command("list")
def show(
    json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
) -> None:
    """List the engines of this host, and what needs them."""
    from . import host_engines

    host_engines.show(json)


@app.command("retire")
def retire(
    digest: Annotated[
        str, typer.Argument(metavar="DIGEST", help="An engine of the list, or how it begins.")
    ],
) -> None:
    """Remove an engine for good: what it has stored is resumed by a reboot from then on."""
    from . import host_engines

    host_engines.retire(digest)
