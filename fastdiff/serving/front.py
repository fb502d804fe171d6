"""Check every request first: its name, its key, the limit of its body; and log all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import logging
import re
import secrets
import time
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdiff.errors import InvalidArgument, printable
from fastdiff.serving.requests import Refusal

log = logging.getLogger("fastdiff.serving")

NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
MOST_HEADERS = 16 << 10  # bytes
KEYED = "/v1/"  # paths that need a key
CONTEXT = "fastdiff"  # key of a scope


@dataclasses.dataclass
class Context:
    """Facts about one request."""

    id: str
    owner: bytes  # digest of its key; empty without keys
    arrived: float
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the log

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.arrived


class Keys:
    """The keys of a file, a line each, of which only digests are kept.

    Args:
        path: The file; None: everyone may ask.

    Raises:
        InvalidArgument: If the file has no key.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path | None):
        lines = [] if path is None else path.read_bytes().splitlines()
        self._digests = [hashlib.sha256(key).digest() for line in lines if (key := line.strip())]
        if path is not None and not self._digests:
            raise InvalidArgument(f"{path} has no key: a line with one for each caller is needed")

    def owner(self, authorization: str | None) -> bytes:
        """Return the digest of a request's key, which names the caller; `Refusal` if it is none of the keys.

        All keys are compared, in a time that does not depend on where they differ.
        """
        if not self._digests:
            return b""
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest(), b""
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known
        if scheme.lower() != "bearer" or not found:
            raise Refusal(401, "a valid key is needed, in the header Authorization: Bearer KEY", "invalid_api_key")
        return found


def respond(e: Refusal) -> Response:
    """Return the response of a refusal."""
    headers = {}
    if e.status == 401:
        headers["www-authenticate"] = "Bearer"
    if e.retry_after_s is not None:
        headers["retry-after"] = str(max(1, int(e.retry_after_s + 1.0)))
    elif e.status in (408, 409) or e.status >= 429:
        headers["x-should-retry"] = "false"  # for OpenAI's client, which would try again
    return Response(e.body, e.status, headers, "application/json")


class Front:
    """Application of ASGI that hands requests on to another one, with a `Context`.

    Args:
        app: The other application.
        keys: The keys of those who may ask.
        max_body: Bytes of a body at most.
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_body: int):
        self._app, self._keys, self._max_body = app, keys, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id")
        valid = given is None or NAME.fullmatch(given)
        context = Context(given if given and valid else f"req-{secrets.token_hex(12)}", b"", time.monotonic())
        scope[CONTEXT] = context
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = context.id
                out["x-total-ms"] = f"{1e3 * context.seconds:.1f}"
                out["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            if not valid:
                raise Refusal(400, "x-request-id: 1 to 64 letters, digits and ._:- are needed", "invalid_value")
            if scope["path"].startswith(KEYED):
                context.owner = self._keys.owner(headers.get("authorization"))
            self._check_length(headers)
            await self._app(scope, self._limited(receive), sending)
        except Refusal as e:
            await respond(e)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            log.info(
                "%s %s %s in %.1f ms, %s", printable(scope["method"][:20]), route, status or "-",
                1e3 * context.seconds, context.id,
                extra={"fields": {"method": printable(scope["method"][:20]), "route": route, "status": status,
                                  "ms": round(1e3 * context.seconds, 1), "request_id": context.id, **context.fields}},
            )  # fmt: skip

    def _check_length(self, headers: Headers) -> None:
        if sum(len(name) + len(value) for name, value in headers.raw) > MOST_HEADERS:
            raise Refusal(431, f"the headers are larger than {MOST_HEADERS} bytes", "headers_too_large")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_body:
            raise self._too_large()
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "content-encoding: bodies must not be compressed", "unsupported_media_type")

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self._max_body} bytes", "body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """Count the bytes of a body, which may be larger than its header says, or come without one."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise self._too_large()
            return message

        return counted
