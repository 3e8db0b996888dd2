"""`wrenn sandbox network`, and how the command line writes network policies."""

from typing import Annotated

import typer

from wrenn_sandbox.cli.account import open_client
from wrenn_sandbox.cli.output import say
from wrenn_sandbox.client import NetworkPolicy, SecretHeader

Internet = Annotated[
    bool | None,
    typer.Option("--internet/--no-internet", help="Whether it reaches the internet, and DNS."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CIDR|NAME",
        help="Open this range, or HTTP and HTTPS of this host, in any case; may be repeated.",
    ),
]
Deny = Annotated[
    list[str] | None, typer.Option(metavar="CIDR", help="Close this range; may be repeated.")
]

Secret = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=HEADER: VALUE",
        help="Have requests by HTTPS to this host bear a secret, such as "
        "'api.example.com=Authorization: Bearer {{secret:KEY}}'; may be repeated.",
    ),
]


def policy_of(
    internet: bool | None,
    allow: list[str] | None,
    deny: list[str] | None,
    secret: list[str] | None,
) -> NetworkPolicy | None:
    """The policy of these options; None when none of them was given."""
    if internet is None and not allow and not deny and not secret:
        return None
    return NetworkPolicy(
        internet=internet is not False,
        allow=tuple(allow or ()),
        deny=tuple(deny or ()),
        secrets=tuple(map(_rule, secret or ())),
    )


def _rule(text: str) -> SecretHeader:
    name, equals, rest = text.partition("=")
    header, colon, value = rest.partition(":")
    if not equals or not colon:
        raise typer.BadParameter("must be NAME=HEADER: VALUE", param_hint="--secret")
    return SecretHeader(name=name.strip(), header=header.strip(), value=value.strip())


def command(
    id: Annotated[str, typer.Argument(metavar="ID", help="The sandbox's id.")],
    internet: Internet = None,
    allow: Allow = None,
    deny: Deny = None,
    secret: Secret = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")] = False,
) -> None:
    """Show what a sandbox may reach or, with options, replace it: what is left out is default."""
    wanted = policy_of(internet, allow, deny, secret)
    with open_client() as client:
        if wanted is None:
            policy = client.sandboxes.network(id)
        else:
            policy = client.sandboxes.set_network(id, wanted)
    say(
        policy,
        f"internet {'open' if policy.internet else 'closed'}",
        *(f"allow {each}" for each in policy.allow),
        *(f"deny {each}" for each in policy.deny),
        *(f"secret {each.name}={each.header}: {each.value}" for each in policy.secrets),
        json=json,
    )
