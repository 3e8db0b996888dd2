"""`wrenn template`: what sandboxes start from, and how the host of a server gets its own."""

from pathlib import Path
from typing import Annotated

import typer

from wrenn_sandbox.client import ClientError

from . import output
from .account import open_client

app = typer.Typer(
    help="Make and list the templates that sandboxes start from.", no_args_is_help=True
)


@app.command("build")
def build(
    name: Annotated[str, typer.Argument(help="Name that the template gets.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe file; without, the one that comes with the name.")
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(help="Package server, or a line of a sources list.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="IMAGE",
            help="Make the disk of an OCI image: NAME:TAG in a registry, oci:DIRECTORY:TAG,"
            " oci-archive:FILE, docker-archive:FILE or dir:DIRECTORY.",
        ),
    ] = None,
    authfile: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Logins of registries; with --from."),
    ] = None,
    cert_dir: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Certificates of a registry (*.crt); with --from."
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do without TLS or its checks; with --from.")
    ] = False,
) -> None:
    """Build a template of this host's from its recipe or an image; unchanged steps are kept."""
    # The host's side is slow to import, and only needed here.
    from . import host_templates

    if image is None:
        if authfile or cert_dir or insecure:
            raise typer.BadParameter("--authfile, --cert-dir and --insecure go with --from")
        host_templates.build(name, recipe, mirror)
        return
    host_templates.build_of_image(
        name,
        image,
        recipe,
        mirror,
        authfile=authfile,
        cert_dir=cert_dir,
        insecure=insecure,
    )


@app.command("list")
def show(
    of_host: Annotated[
        bool, typer.Option("--host", help="What is built on this machine, with its images.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
) -> None:
    """List what sandboxes can start from: the server's templates and the team's own."""
    if of_host:
        from . import host_templates

        host_templates.show(json)
        return
    try:
        client = open_client()
    except ClientError as error:
        raise ClientError(f"{error} (--host lists what is built on this machine)") from error
    with client:
        found = client.snapshots.list()
    output.show(found, "name type vcpus memory_mb size_bytes created_at sandbox_id", json=json)


@app.command("delete")
def delete(name: Annotated[str, typer.Argument(metavar="NAME", help="One of the team's.")]) -> None:
    """Give up a template of the team's; sandboxes made from it keep working."""
    with open_client() as client:
        client.snapshots.delete(name)


@app.command("snapshot")
def snapshot(
    id: Annotated[str, typer.Argument(metavar="ID", help="A running sandbox; it ends with it.")],
    name: Annotated[str | None, typer.Option(help="The template's name; one is made up.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a template of that name.")
    ] = False,
    idempotency_key: output.IdempotencyKey = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")] = False,
) -> None:
    """Make a template of a running sandbox and print its name."""
    with open_client() as client:
        template = client.snapshots.create(
            id, name, overwrite=overwrite, idempotency_key=idempotency_key
        )
    output.say(template, template.name, json=json)
