"""The application: which path leads where."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lmjax.errors import UserError
from lmjax.serving.endpoints import Endpoints, Limits
from lmjax.serving.errors import ApiError, respond
from lmjax.serving.guard import Guard
from lmjax.serving.metrics import Metrics
from lmjax.serving.openapi import document
from lmjax.serving.requests import Busy
from lmjax.serving.served_model import Served

PAGE = Path(__file__).parent / "page"


def make_app(models: Sequence[Served], limits: Limits, *, key: str, hosts: Collection[str],
             most: int, draining: Callable[[], bool]) -> Starlette:
    """Makes the application.

    Args:
      models: what is served.
      limits: of one request.
      key, hosts, most: see `Guard`.
      draining: whether the server is about to end.
    """
    metrics = Metrics({m.name: m.engine for m in models if m.engine})
    api, published = Endpoints(models, limits, metrics), document(models, with_key=bool(key))

    async def index(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def openapi(request: Request) -> Response:
        return JSONResponse(published)

    async def health(request: Request) -> Response:
        over = draining()
        return JSONResponse({"status": "draining" if over else "ok"}, 503 if over else 200)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
        Route("/v1/models", api.list_models),
        Route("/v1/models/{model}", api.show_model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", show_metrics),
        Route("/openapi.json", openapi),
        Route("/", index),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, key=key, hosts=hosts, most=most, metrics=metrics)],
        exception_handlers={kind: respond for kind in (
            ApiError, UserError, Busy, HTTPException, ClientDisconnect, Exception)})
