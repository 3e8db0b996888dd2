"""Calls of E2B's API as its clients make them, with answers that its newest client can read."""

from e2b.api.client.models import ListedSandbox, SandboxDetail
from e2b.api.client.models import Sandbox as Started

from support.api_server import Team


async def created(team: Team, path: str = "/v2/sandboxes", **body: object) -> str:
    """The id of a new sandbox."""
    answer = await team.client.post(path, json={"templateID": "minimal", **body})
    assert answer.status_code == 201, answer.text
    return Started.from_dict(answer.json()).sandbox_id


async def detail(team: Team, id: str) -> SandboxDetail:
    answer = await team.client.get(f"/sandboxes/{id}")
    assert answer.status_code == 200, answer.text
    return SandboxDetail.from_dict(answer.json())


async def listed(team: Team, path: str = "/v2/sandboxes", **query: str) -> list[str]:
    """The ids of the sandboxes in one page of a list."""
    answer = await team.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return [ListedSandbox.from_dict(each).sandbox_id for each in answer.json()]
