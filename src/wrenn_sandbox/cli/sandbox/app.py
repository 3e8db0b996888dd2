"""`wrenn sandbox`: the life of sandboxes."""

import re
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal

import typer

from wrenn_sandbox.cli import output
from wrenn_sandbox.cli.account import open_client
from wrenn_sandbox.cli.output import IdempotencyKey, printable, when
from wrenn_sandbox.client import LogLine, Sandbox, SandboxInfo

from . import exec, network, shell

app = typer.Typer(help="Make sandboxes, work in them and end them.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="The sandbox's id.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of sandboxes.")]
Label = Annotated[
    list[str] | None,
    typer.Option("--label", "-l", metavar="KEY=VALUE", help="A label of it; may be repeated."),
]
Deadline = Annotated[
    int | None,
    typer.Option(metavar="SEC", help="Pause it so long from now whatever it does; 0: never."),
]
DeleteAtDeadline = Annotated[
    bool | None,
    typer.Option("--delete-at-deadline/--pause-at-deadline", help="What the deadline does."),
]
AutoResume = Annotated[
    bool | None,
    typer.Option("--auto-resume/--no-auto-resume", help="Resume it on a request to a port."),
]
PrivatePorts = Annotated[
    bool | None,
    typer.Option("--private-ports/--public-ports", help="Whether its ports need its token."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")]

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([MG]?)(?:i?B)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "M": 1, "G": 1024}
_TIME: Final = re.compile(r"([0-9]{1,6})([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# From the id on, everything is the command's.
COMMAND_LINE: Final = {"allow_interspersed_args": False}
app.command("exec", context_settings=COMMAND_LINE)(exec.command)
app.command("shell", context_settings=COMMAND_LINE)(shell.command)
app.command("network")(network.command)


@app.command("create")
def create(
    template: Annotated[
        str | None, typer.Option("--template", "-t", help="What to start from.")
    ] = None,
    vcpus: Annotated[int | None, typer.Option(help="Virtual processors.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory: MiB, or with a unit, such as 1G.", metavar="SIZE"),
    ] = None,
    timeout: Annotated[
        int | None, typer.Option(help="Pause it after so long without activity.", metavar="SEC")
    ] = None,
    deadline: Deadline = None,
    delete_at_deadline: DeleteAtDeadline = None,
    auto_resume: AutoResume = None,
    private_ports: PrivatePorts = None,
    internet: network.Internet = None,
    allow: network.Allow = None,
    deny: network.Deny = None,
    secret: network.Secret = None,
    label: Label = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            "-e",
            metavar="NAME=VALUE",
            help="Environment of all its commands; may be repeated.",
        ),
    ] = None,
    idempotency_key: IdempotencyKey = None,
    json: Json = False,
) -> None:
    """Start a sandbox and print its id. What is not given is the server's choice."""
    policy = network.policy_of(internet, allow, deny, secret)
    memory_mb = None if memory is None else _mib(memory)
    with open_client() as client:
        sandbox = client.sandboxes.create(
            template,
            vcpus=vcpus,
            memory_mb=memory_mb,
            timeout_sec=timeout,
            deadline_sec=deadline,
            on_deadline=_on_deadline(delete_at_deadline),
            auto_resume=auto_resume,
            private_ports=private_ports,
            network=policy,
            metadata=_labels_of(label),
            envs=exec.environment_of(env or []),
            idempotency_key=idempotency_key,
        )
    output.say(sandbox.info, sandbox.id, json=json)


def _on_deadline(delete: bool | None) -> Literal["pause", "delete"] | None:
    if delete is None:
        return None
    return "delete" if delete else "pause"


def _labels_of(given: list[str] | None) -> dict[str, str]:
    return exec.pairs_of(given or [], "KEY=VALUE", "--label")


def _mib(size: str) -> int:
    """MiB of a size such as `512`, `512M` or `1.5GiB`."""
    found = _SIZE.fullmatch(size.strip())
    mib = 0.0 if found is None else float(found[1]) * _UNITS[found[2].upper()]
    if mib < 1 or not mib.is_integer():
        raise typer.BadParameter(
            f"{size!r} is not a size: give MiB, or a size such as 512M or 1.5G",
            param_hint="--memory",
        )
    return int(mib)


@app.command("get")
def get(id: Id, json: Json = False) -> None:
    """Show all there is to know of one sandbox."""
    with open_client() as client:
        info = client.sandboxes.get(id).info
    rows = (
        ("id", info.id),
        ("status", info.status),
        ("reason", info.reason or ""),
        ("template", info.template),
        ("vcpus", str(info.vcpus)),
        ("memory", f"{info.memory_mb} MB"),
        ("disk used", f"{info.disk_bytes // (1024 * 1024)} MB"),
        ("timeout", f"{info.timeout_sec} s" if info.timeout_sec else "none"),
        ("deadline", f"{info.on_deadline} at {when(info.deadline_at)}" if info.deadline_at else ""),
        *(("label", f"{key}={value}") for key, value in sorted(info.metadata.items())),
        ("ports", _ports_of(info)),
        ("internet", "open" if info.network.internet else "closed"),
        ("created", when(info.created_at)),
        ("started", when(info.started_at)),
        ("last active", when(info.last_active_at)),
    )
    lines = (f"{name:<12} {printable(value)}" for name, value in rows if value)
    output.say(info, *lines, json=json)


def _ports_of(info: SandboxInfo) -> str:
    words = ("private" if info.private_ports else "public", "resume it" * info.auto_resume)
    return ", ".join(each for each in words if each)


@app.command("url")
def url(
    id: Id,
    port: Annotated[int, typer.Argument(metavar="PORT", min=1, max=65535, help="In the sandbox.")],
    json: Json = False,
) -> None:
    """Print where a program that listens on a port of a sandbox is reached.

    As JSON with the tokens that requests may need.
    """
    with open_client() as client:
        ports = client.sandboxes.ports(id)
    output.say(ports, ports.url_of(port), json=json)


@app.command("list")
def show(
    all: Annotated[bool, typer.Option("--all", "-a", help="Ended ones too.")] = False,
    label: Label = None,
    status: Annotated[
        list[str] | None, typer.Option(help="Those in this state; may be repeated.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", "-t", help="Those that started from it.")
    ] = None,
    json: Json = False,
) -> None:
    """List the team's sandboxes, newest first; of several labels each has to be there."""
    with open_client() as client:
        found = client.sandboxes.list(
            metadata=_labels_of(label), status=status or (), template=template
        )
    shown = [each for each in found if all or status or each.status not in ("stopped", "error")]
    output.show(shown, "id status template vcpus memory_mb created_at last_active_at", json=json)


@app.command("update")
def update(
    id: Id,
    label: Label = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Take all labels off.")] = False,
    timeout: Annotated[
        int | None,
        typer.Option(help="Pause it after so long without activity; 0: never.", metavar="SEC"),
    ] = None,
    deadline: Deadline = None,
    delete_at_deadline: DeleteAtDeadline = None,
    auto_resume: AutoResume = None,
    private_ports: PrivatePorts = None,
    json: Json = False,
) -> None:
    """Change labels, timers or the use of ports. Labels that are given replace all that it has."""
    if no_labels and label:
        raise typer.BadParameter("it cannot stand beside --label", param_hint="--no-labels")
    metadata = _labels_of(label) if label or no_labels else None
    with open_client() as client:
        info = client.sandboxes.update(
            id,
            metadata=metadata,
            timeout_sec=timeout,
            deadline_sec=deadline,
            on_deadline=_on_deadline(delete_at_deadline),
            auto_resume=auto_resume,
            private_ports=private_ports,
        )
    output.say(info, json=json)


@app.command("pause")
def pause(ids: Ids, json: Json = False) -> None:
    """Store running sandboxes on disk and free everything else."""
    with open_client() as client:
        _tell([client.sandboxes.pause(each) for each in ids], json)


@app.command("resume")
def resume(
    ids: Ids,
    reboot: Annotated[
        bool,
        typer.Option(
            "--reboot", help="Start from the disk: files are kept, processes and memory are gone."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Continue paused sandboxes where they were."""
    with open_client() as client:
        _tell([client.sandboxes.resume(each, memory=not reboot) for each in ids], json)


@app.command("checkpoint")
def checkpoint(
    id: Id,
    name: Annotated[str | None, typer.Option(help="The snapshot's name; one is made up.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a template of that name.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a snapshot of a sandbox, which stays as it is, and print the snapshot's name."""
    with open_client() as client:
        template = client.sandboxes.snapshot(id, name, overwrite=overwrite)
    output.say(template, template.name, json=json)


@app.command("fork")
def fork(
    id: Id,
    count: Annotated[int, typer.Option("--count", "-n", help="How many, up to 20.")] = 1,
    timeout: Annotated[
        int | None, typer.Option(help="Pause them after so long without activity.", metavar="SEC")
    ] = None,
    json: Json = False,
) -> None:
    """Make sandboxes that go on from where one is, and print their ids; it stays as it is."""
    with open_client() as client:
        forks = client.sandboxes.fork(id, count, timeout_sec=timeout)
    made = [each.info for each in forks if isinstance(each, Sandbox)]
    output.say(made, *(each.id for each in made), json=json)
    failures = [each for each in forks if not isinstance(each, Sandbox)]
    if failures:
        raise failures[0]


@app.command("rollback")
def rollback(
    id: Id,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="One that was made of it.")],
    json: Json = False,
) -> None:
    """Let a sandbox go on from a snapshot that was made of it; what it was until then is gone."""
    with open_client() as client:
        info = client.sandboxes.rollback(id, snapshot)
    output.say(info, f"{info.id} {info.status}", json=json)


def _tell(infos: list[SandboxInfo], json: bool) -> None:
    output.say(infos, *(f"{each.id} {each.status}" for each in infos), json=json)


@app.command("delete")
def delete(ids: Ids) -> None:
    """End sandboxes, whatever their state; may be repeated."""
    with open_client() as client:
        for each in ids:
            client.sandboxes.delete(each)


@app.command("metrics")
def metrics(
    id: Id,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="From so long ago until now: 90s, 15m, 2h or 1d."),
    ] = None,
    json: Json = False,
) -> None:
    """What a sandbox uses now, or what it has used since some time ago."""
    with open_client() as client:
        if since is None:
            now = client.sandboxes.metrics(id)
            output.show([now], "cpu_used_pct cpu_count mem_used mem_total disk_used", json=json)
            return
        start = datetime.now(UTC) - _ago(since)
        history = client.sandboxes.metrics_history(id, start)
    if json:
        output.print_json(history)
        return
    fields = "time cpu_used_pct mem_used mem_cache disk_used net_received net_sent"
    output.show(history.samples, fields, json=False)


def _ago(text: str) -> timedelta:
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is not a time such as 90s, 15m, 2h or 1d", param_hint="--since"
        )
    return timedelta(seconds=int(found[1]) * _SECONDS[found[2]])


@app.command("logs")
def logs(
    id: Id,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the sandbox has ended.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, max=1000, help="How many of the last ones.")
    ] = 100,
    json: Json = False,
) -> None:
    """What a sandbox wrote to its console, and when; control characters are not shown."""
    with exec.own_failures() if follow else nullcontext(), open_client() as client:
        last = client.sandboxes.logs(id, backward=True, limit=lines).lines
        if json and not follow:
            output.print_json(last[::-1])
            return
        for line in last[::-1]:
            _print_line(line, json)
        if follow:
            for line in client.sandboxes.follow_logs(id, last[0].id if last else None):
                _print_line(line, json)


def _print_line(line: LogLine, json: bool) -> None:
    if json:
        output.print_json(line)
    else:
        typer.echo(f"{when(line.time)}  {line.source:<7}  {printable(line.text)}")


@app.command("events")
def events(id: Id, json: Json = False) -> None:
    """What happened to a sandbox and why, newest first."""
    with open_client() as client:
        found = client.sandboxes.events(id)
    output.show(found, "time from_state to_state actor reason", json=json)
