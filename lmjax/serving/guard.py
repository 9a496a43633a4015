"""What every request passes: its host, its key, the number of requests in all, headers, counts."""

import hmac
import time
from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from lmjax.serving.errors import ApiError
from lmjax.serving.metrics import Metrics

# The page loads nothing from elsewhere, runs no script but its own files, and is framed by nobody.
CONTENT_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                  "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = {"Content-Security-Policy": CONTENT_POLICY, "X-Content-Type-Options": "nosniff",
           "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
           "Cross-Origin-Resource-Policy": "same-origin"}
OPEN = ("/", "/health", "/openapi.json", "/favicon.ico")  # and the files of the page
PAGE = "/page/"


class Guard:
    """Stands before the application."""

    def __init__(self, app: ASGIApp, *, key: str, hosts: Collection[str], most: int,
                 metrics: Metrics):
        """
        Args:
          app: the application.
          key: what clients must know; "" for no key.
          hosts: names in the header Host. Without a key a server on this machine must not be
            reached by the page of a stranger's domain that resolves to 127.0.0.1. Empty: any.
          most: requests that are answered at the same time.
          metrics: counts requests.
        """
        self._app, self._key, self._hosts = app, key.encode(), hosts
        self._most, self._metrics, self._now = most, metrics, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 499

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            await self._let_in(scope, receive, sending)
        except Exception:
            status = 500  # Starlette answers so, and logs the traceback
            raise
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "other")
            self._metrics.request(endpoint, status, time.monotonic() - began)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        self._now += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._now -= 1

    def _check(self, scope: Scope) -> None:
        """
        Raises:
          ApiError: the request is not let in.
        """
        headers, path = Headers(scope=scope), scope["path"]
        if self._hosts and _host(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "This server answers to the names "
                           f"{', '.join(sorted(self._hosts))} only.", code="wrong_host")
        if self._key and path not in OPEN and not path.startswith(PAGE):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
            if scheme.lower() != "bearer" or not known:
                raise ApiError(401, "The API key is missing or wrong: send the header "
                               "Authorization: Bearer KEY.", code="invalid_api_key",
                               headers={"WWW-Authenticate": "Bearer"})
        if self._now >= self._most:
            raise ApiError(429, f"This server answers {self._most} requests at a time.",
                           code="too_many_requests", headers={"Retry-After": "1"})


def _host(header: str) -> str:
    """The name in a header Host, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
