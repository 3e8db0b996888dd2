"""Whether a team has anybody left: a team whose users are all disabled can do nothing."""

from sqlalchemy import ColumnElement, exists

from .tables import memberships, users


def has_somebody(team_id: ColumnElement[str]) -> ColumnElement[bool]:
    """The condition that somebody in the team of this column is not disabled."""
    return exists().where(
        memberships.c.team_id == team_id,
        users.c.id == memberships.c.user_id,
        users.c.disabled_at.is_(None),
    )
