"""`/docs` and `/openapi.json`: a page that needs nothing but this server."""

import asyncio
import json
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, FastAPI
from starlette.responses import RedirectResponse, Response

from .openapi import build_openapi

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def add_docs(app: FastAPI, server_url: str) -> None:
    """Serve the documents of the routes that `app` has until now."""
    package = files(__package__)
    page = package.joinpath("docs.html").read_bytes()
    script = package.joinpath("docs.js").read_bytes()
    router = APIRouter(include_in_schema=False)
    routes = list(app.routes)

    @cache
    def document() -> bytes:
        return json.dumps(build_openapi(routes, server_url)).encode("ascii")

    @router.get("/")
    async def lead_to_docs() -> Response:
        return RedirectResponse("/docs", status_code=302)

    @router.get("/openapi.json")
    async def read_openapi() -> Response:
        return Response(await asyncio.to_thread(document), media_type="application/json")

    @router.get("/docs")
    async def read_docs() -> Response:
        return Response(page, media_type="text/html", headers=_HEADERS)

    @router.get("/docs.js")
    async def read_script() -> Response:
        return Response(script, media_type="text/javascript", headers=_HEADERS)

    app.include_router(router)
