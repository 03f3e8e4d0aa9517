"""The page at ``/``: one question about an image, answered with all visual tokens and with Skip-Vision.

The page is a client of the API in the browser. This module only serves its files.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import NotModifiedResponse, StaticFiles

FOLDER = Path(__file__).parent

_MEDIA_TYPES = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "api.js": "text/javascript",
    "answer.js": "text/javascript",
    "overlay.js": "text/javascript",
    "settings.js": "text/javascript",
}

_HEADERS = {
    # No other hosts, nothing inline. data: and blob: are the chosen image and the icon.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


_is_not_modified = StaticFiles(directory=FOLDER).is_not_modified


def page_routes() -> APIRouter:
    """Return the routes of the page and its files. They need no API key: users type it into the page."""
    routes = APIRouter()

    @routes.get("/", response_class=FileResponse)
    async def page(request: Request) -> Response:
        """Show a page to try the endpoint: one question, answered with all visual tokens and with fewer."""
        return _file("index.html", "text/html", request)

    @routes.get("/page/{name}", include_in_schema=False, response_class=FileResponse)
    async def file(name: str, request: Request) -> Response:
        if name not in _MEDIA_TYPES:
            raise HTTPException(404, "Not Found")
        return _file(name, _MEDIA_TYPES[name], request)

    return routes


def _file(name: str, media_type: str, request: Request) -> Response:
    """Return a file, or 304 if the browser has this version."""
    path = FOLDER / name
    found = FileResponse(path, media_type=media_type, headers=_HEADERS, stat_result=path.stat())
    return NotModifiedResponse(found.headers) if _is_not_modified(found.headers, request.headers) else found
