"""`wrenn admin set-quota`: limits that are different for one team."""

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.model.quota import QuotaOverride, encode_override

from .access import administer

if TYPE_CHECKING:
    from wrenn_sandbox.control.store.administration import Administration


def command(
    team: Annotated[str, typer.Argument(metavar="TEAM", help="Id of a team.")],
    limits: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LIMIT=NUMBER...]",
            help="0 is no limit, nothing after the = what every team has. "
            f"Limits: {', '.join(QuotaOverride.__struct_fields__)}.",
        ),
    ] = None,
) -> None:
    """Give one team limits of its own, and print those that it has then."""
    wanted = dict(_parsed(each) for each in limits or [])

    async def work(admin: "Administration") -> QuotaOverride:
        team_id = await admin.team(team)
        quota = changed(await admin.quota(team_id), wanted)
        if wanted:
            await admin.set_quota(team_id, quota, utc_now())
        return quota

    typer.echo(encode_override(administer(work)))


def changed(quota: QuotaOverride, wanted: dict[str, int | None]) -> QuotaOverride:
    """`quota` with these limits in place of its own; raises `InvalidRequest`."""
    try:
        return msgspec.convert({**msgspec.structs.asdict(quota), **wanted}, QuotaOverride)
    except msgspec.ValidationError as error:
        names = ", ".join(QuotaOverride.__struct_fields__)
        raise InvalidRequest(f"Not a quota: {error}. The limits are {names}") from error


def _parsed(text: str) -> tuple[str, int | None]:
    name, equals, number = text.partition("=")
    if not equals or not (number == "" or (number.isascii() and number.isdigit())):
        raise typer.BadParameter(f"{text!r} is not LIMIT=NUMBER")
    return name, int(number) if number else None
