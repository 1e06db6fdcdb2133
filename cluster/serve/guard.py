"""What every request passes: the token, where it comes from, and its size."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.responses import JSONResponse

from cluster.serve.settings import TOKEN, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = {"/", "/healthz"}  # the page asks for the token itself; a probe has none


class Guard:
    """Middleware that refuses requests before anything reads their body."""

    def __init__(
        self,
        app: Any,
        token: str | None,
        limit: int,
        policy: str,
        count: Callable[[str, int, float], None],
    ) -> None:
        self.app, self.token, self.limit, self.policy = app, token, limit, policy
        self.count = count  # called with the path of the route, the status and the seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refused := self._refusal(scope):
            status, text = refused
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            answer = JSONResponse({"error": text}, status, headers)
            await answer(scope, receive, self._with_headers(send, scope))
            return
        received = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise HTTPException(413, self._too_large())
            return message

        await self.app(scope, bounded, self._with_headers(send, scope))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        host, client = header(scope, b"host"), scope.get("client") or [""]
        # A page elsewhere could give its own name the address of this machine: check the name too.
        if self.token is None and not (
            is_loopback(urlsplit(f"//{host}").hostname or "") and is_loopback(client[0])
        ):
            return 403, "without a token this service answers on loopback only"
        origin = header(scope, b"origin")
        if origin and urlsplit(origin).netloc != host:
            return 403, "requests of other sites' pages are refused"
        if scope["path"] not in OPEN and not is_authorized(scope, self.token):
            return 401, f"send the service's token as `Authorization: Bearer …` (see {TOKEN})"
        length = header(scope, b"content-length")
        if length.isdigit() and int(length) > self.limit:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"a request may have {self.limit:,} bytes: send a smaller image"

    def _with_headers(self, send: Send, scope: Scope) -> Send:
        began = time.monotonic()

        async def sender(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.count(path, message["status"], time.monotonic() - began)
                added = [
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cache-control", b"no-store"),
                    (b"content-security-policy", self.policy.encode()),
                ]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        return sender


def is_authorized(scope: Scope, token: str | None) -> bool:
    """Whether a request has the token, or needs none."""
    if token is None:
        return True
    kind, _, given = header(scope, b"authorization").partition(" ")
    found = hashlib.sha256(given.strip().encode()).hexdigest()
    return kind.lower() == "bearer" and hmac.compare_digest(found, token)


def header(scope: Scope, name: bytes) -> str:
    """A header's value, or an empty string."""
    return dict(scope["headers"]).get(name, b"").decode("latin-1")


def content_policy(page: str) -> str:
    """The content security policy: only what is in the page itself runs, and asks this service."""
    sources = {
        name: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        )
        for name in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
