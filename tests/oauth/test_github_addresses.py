"""Which addresses a login with GitHub uses, at GitHub itself and at an Enterprise Server."""

import httpx2
import msgspec
import pytest

from wrenn_sandbox.control.oauth.github import GitHub
from wrenn_sandbox.control.oauth.http import ProviderHttp
from wrenn_sandbox.control.oauth.provider import Profile
from wrenn_sandbox.settings import Settings

_LOGIN = {
    "oauth_github_client_id": "id",
    "oauth_github_client_secret": "secret",
    "oauth_redirect_url": "https://front.example.com",
    "public_url": "https://api.example.com",
}
_ANSWERS: dict[str, object] = {
    "/login/oauth/access_token": {"access_token": "t", "token_type": "bearer"},
    "/user": {"id": 7},
    "/user/emails": [{"email": "a@example.com", "primary": True, "verified": True}],
}


@pytest.mark.parametrize(
    ("url", "api_url"),
    [
        ({}, "https://api.github.com"),
        ({"oauth_github_url": "https://git.example.com"}, "https://git.example.com/api/v3"),
    ],
)
async def test_where_the_api_is(url: dict[str, str], api_url: str) -> None:
    settings = Settings.model_validate({**_LOGIN, **url})
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        body = msgspec.json.encode(_ANSWERS[request.url.path.removeprefix("/api/v3")])
        return httpx2.Response(200, stream=httpx2.ByteStream(body))

    assert GitHub.is_configured(settings)
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer)) as client:
        github = GitHub(settings, ProviderHttp(client))
        callback = "https://wrenn.example/callback"
        profile = await github.profile(code="code", redirect_uri=callback, verifier="verifier")
    assert profile == Profile(subject="7", email="a@example.com")
    assert asked == [
        f"{settings.oauth_github_url}/login/oauth/access_token",
        f"{api_url}/user",
        f"{api_url}/user/emails?per_page=100",
    ]
