"""Endpoints: what is under /v1/amygdala, on the server's own port; token first, bounded, JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ..errors import LiveError
from .operations import TOKEN, Operations, Refused
from .settings import Settings

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI, Request
    from starlette.datastructures import State
    from starlette.responses import Response

PREFIX = "/v1/amygdala"
HEADER = "X-Amygdala-Token"
"""Another place for the token, where vLLM's --api-key claims the header `Authorization`."""

ROUTES = (
    ("POST", "/train", "train"),
    ("GET", "/train/{job}", "job"),
    ("GET", "/status", "status"),
    ("POST", "/checkpoint", "checkpoint"),
    ("POST", "/rollback", "rollback"),
    ("GET", "/history", "history"),
    ("GET", "/readout/{request_id}", "readout"),
    ("GET", "/steering", "steering"),
    ("PUT", "/steering", "steer"),
    ("DELETE", "/steering", "unsteer"),
)
"""Method, path, and the name of the operation."""

_SMALL = 1 << 16  # bytes of any body but a job's
_HOW = f"send `Authorization: Bearer TOKEN` (or `{HEADER}: TOKEN`)"


class AmygdalaEndpoints:
    """Entry point of `vllm.endpoint_plugins`; loaded where VLLM_PLUGINS names `amygdala_http`."""

    name = "amygdala_http"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._operations: Operations | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Called by vLLM when it builds its application."""
        from fastapi import APIRouter, Request

        router = APIRouter(prefix=PREFIX, tags=["amygdala"])
        for method, path, name in ROUTES:
            endpoint = self._endpoint(name, has_body=method in ("POST", "PUT"))
            # FastAPI looks for the type by its name, which this module has for type checkers only.
            endpoint.__annotations__["request"] = Request
            router.add_api_route(path, endpoint, methods=[method], response_model=None, name=name)
        app.include_router(router)
        app.router.lifespan_context = self._around(app.router.lifespan_context)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Called by vLLM when the engine runs, before it listens.

        Raises LiveError, which ends the server, without a private folder, a token and weights.
        """
        self._operations = Operations(Settings.from_environment(), engine_client, args)
        await self._operations.start()

    def _endpoint(self, name: str, *, has_body: bool) -> Callable[..., Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            from starlette.responses import JSONResponse

            try:
                self._check_token(request)
                named = dict(request.path_params)
                if has_body:
                    named["content"] = await self._body(request, name)
                status, content = await getattr(self._operations, name)(**named)
            except Refused as error:
                return _refusal(error)
            except LiveError as error:
                return _refusal(Refused(422, "invalid", str(error)))
            return JSONResponse(content, status)

        return endpoint

    def _check_token(self, request: Request) -> None:
        scheme, _, told = request.headers.get("Authorization", "").partition(" ")
        told = request.headers.get(HEADER, told if scheme.lower() == "bearer" else "").strip()
        if self._operations is None or not self._operations.is_token(told):
            where = f", the content of the file `{TOKEN}` in the server's runtime folder"
            raise Refused(401, "unauthorised", f"{'wrong' if told else 'no'} token: {_HOW}{where}")

    async def _body(self, request: Request, name: str) -> Any:
        """The JSON of a body, None if it is empty; read no further than what is allowed."""
        limit = self._operations.supervisor.limits.message_bytes if name == "train" else _SMALL
        too_large = Refused(413, "too large", f"the body is too large: at most {limit:,} bytes")
        told = request.headers.get("Content-Length", "0")
        if not told.isdigit() or int(told) > limit:
            raise too_large
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise too_large
        try:
            return json.loads(content, parse_constant=_refuse_constant) if content else None
        except (ValueError, RecursionError) as error:
            raise Refused(422, "invalid", f"the body is no JSON: {error}") from error

    def _around(self, lifespan: Callable[..., Any]) -> Callable[..., Any]:
        @asynccontextmanager
        async def context(app: FastAPI) -> AsyncIterator[Any]:
            async with lifespan(app) as state:
                try:
                    yield state
                finally:
                    if self._operations is not None:
                        await self._operations.stop()

        return context


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _refusal(error: Refused) -> Response:
    from starlette.responses import JSONResponse

    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}}.get(error.status)
    return JSONResponse({"error": str(error), "kind": error.kind}, error.status, headers)
