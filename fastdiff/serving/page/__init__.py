"""The page at ``/``: files that are read once, at paths that are fixed, so that no request names a file."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """Return the routes of the page and its files."""
    files = [path for path in sorted(Path(__file__).parent.iterdir()) if path.suffix in TYPES]
    return [_route("/" if path.suffix == ".html" else f"/page/{path.name}", path) for path in files]


def _route(at: str, path: Path) -> Route:
    content, kind = path.read_bytes(), TYPES[path.suffix]

    async def answer(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return Route(at, answer)
