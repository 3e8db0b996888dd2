"""`/teams`: the caller's team."""

from fastapi import APIRouter
from starlette.requests import Request

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.responses import failures

from .fields import E2BResponse

router = APIRouter(prefix="/teams", tags=["e2b"])


class Team(E2BResponse):
    """`apiKey` is the key of the request, "" where it has none: keys are not kept."""

    team_id: str
    name: str
    api_key: str
    is_default: bool = True


@router.get("", operation_id="e2bListTeams", responses=failures(401))
async def list_teams(request: Request, team_id: CallerTeam) -> list[Team]:
    """The one team that a credential acts for."""
    key = request.headers.get("x-api-key", "").strip()
    return [Team(team_id=team_id, name=team_id, api_key=key)]
