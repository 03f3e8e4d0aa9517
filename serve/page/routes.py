"""The page at ``/``: one question about an image, answered with all visual tokens and with Skip-Vision.

The page is a client of the API in the browser. This module only serves its files.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

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


def page_routes() -> APIRouter:
    """Return the routes of the page and its files. They need no API key: users type it into the page."""
    routes = APIRouter()

    @routes.get("/", response_class=FileResponse)
    async def page() -> FileResponse:
        """Show a page to try the endpoint: one question, answered with all visual tokens and with fewer."""
        return FileResponse(FOLDER / "index.html", media_type="text/html", headers=_HEADERS)

    @routes.get("/page/{name}", include_in_schema=False, response_class=FileResponse)
    async def file(name: str) -> FileResponse:
        if name not in _MEDIA_TYPES:
            raise HTTPException(404, "Not Found")
        return FileResponse(FOLDER / name, media_type=_MEDIA_TYPES[name], headers=_HEADERS)

    return routes
