"""The `wrenn` command: one sub-command a module, one place where errors become one line."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from wrenn_sandbox.client import ClientError
from wrenn_sandbox.errors import WrennError

from . import account, copy, engine, events, process, secret, serve, template, unit, usage, webhook
from .admin import app as admin
from .advice import told
from .output import printable
from .sandbox import app as sandbox

app = typer.Typer(
    name="wrenn",
    help="Virtual machines on demand: use them, serve them, look after their host.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"wrenn {version('wrenn-sandbox')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Virtual machines on demand: use them, serve them, look after their host."""


app.command("login")(account.login)
app.command("logout")(account.logout)
app.command("whoami")(account.whoami)
app.command("e2b")(account.e2b)
app.add_typer(sandbox.app, name="sandbox")
app.add_typer(process.app, name="process")
app.command("events")(events.command)
app.command("usage")(usage.command)
app.add_typer(secret.app, name="secret")
app.add_typer(webhook.app, name="webhook")
app.command("cp")(copy.command)
app.command("serve")(serve.command)
app.command("unit")(unit.command)


# These two import the host's modules, which takes as long as all that other commands need.
@app.command("demo")
def _demo() -> None:
    """Build, start a server, run a program in a machine, clean up; every step with its time."""
    from . import demo

    demo.run()


@app.command("doctor")
def _doctor(
    reports: Annotated[
        list[Path] | None,
        typer.Argument(help="What --json has printed on several hosts: say what they share."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
) -> None:
    """Say what this machine can do; exit code 1 when sandboxes cannot run on it."""
    from . import doctor

    if reports:
        raise typer.Exit(0 if doctor.common(reports) else 1)
    raise typer.Exit(0 if doctor.report(json) else 1)


app.add_typer(template.app, name="template")
app.add_typer(engine.app, name="engine")
app.add_typer(admin.app, name="admin")


def _complaints(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in each['loc']) or 'settings'}: {each['msg']}"
        for each in error.errors()
    )


def main() -> None:
    """Run the command line; an error of ours is one line on standard error and exit code 1."""
    try:
        app()
    except WrennError as error:
        detail = f" ({error.detail})" if error.detail else ""
        sys.exit(f"wrenn: {error}{detail}")
    except ClientError as error:
        sys.exit(f"wrenn: {printable(told(error))}")
    except ValidationError as error:
        sys.exit(f"wrenn: a setting is not acceptable: {_complaints(error)}")
