"""Names of templates on the wire: `team/name:tag`."""

from typing import Final

from wrenn_sandbox.errors import InvalidRequest, NotFound
from wrenn_sandbox.ids import TeamId

BASE: Final = "base"
"""The template that clients ask for when their caller names none."""

_TAG: Final = "default"
"""The one tag that templates have."""


def full_name(team_id: TeamId, name: str) -> str:
    """A template's name with its team and tag."""
    return f"{team_id}/{name}:{_TAG}"


def template_name(team_id: TeamId, text: str) -> str:
    """The name of a template that a caller writes as `name`, `name:tag` or `team/name:tag`.

    Raises `NotFound` for another team's, and for another tag.
    """
    team, slash, rest = text.rpartition("/")
    name, colon, tag = rest.partition(":")
    if (slash and team != team_id) or (colon and tag != _TAG):
        raise NotFound("There is no such template")
    return name


def new_template_name(team_id: TeamId, text: str) -> str:
    """The same of a template that is to be made; raises `InvalidRequest`."""
    try:
        return template_name(team_id, text)
    except NotFound:
        message = f"name: must be a name of this team's, and its tag {_TAG} where it has one"
        raise InvalidRequest(message) from None


def missing(name: str) -> NotFound:
    """What to say of a template that is not there."""
    if name == BASE:
        return NotFound(
            "There is no template base yet; the operator makes it with `wrenn template build base`"
        )
    return NotFound(f"There is no template {name[:64]}; GET /v1/snapshots has their names")
