"""The page at ``/``: one question about an image, answered with all visual tokens and with Skip-Vision.

It asks the API as any client would, from the browser: this module only hands out its files.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent

_KINDS = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "api.js": "text/javascript",
    "answer.js": "text/javascript",
    "overlay.js": "text/javascript",
    "settings.js": "text/javascript",
}

_HEADERS = {
    # Nothing from elsewhere, nothing inline; data: and blob: are the image that was chosen, and the icon.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The page and its files. They need no API key: it is typed into the page."""
    routes = APIRouter()

    @routes.get("/", response_class=FileResponse)
    async def page() -> FileResponse:
        """A page to try it: one question, answered with all visual tokens and with Skip-Vision."""
        return FileResponse(FOLDER / "index.html", media_type="text/html", headers=_HEADERS)

    @routes.get("/page/{name}", include_in_schema=False, response_class=FileResponse)
    async def file(name: str) -> FileResponse:
        if name not in _KINDS:
            raise HTTPException(404, "Not Found")
        return FileResponse(FOLDER / name, media_type=_KINDS[name], headers=_HEADERS)

    return routes
