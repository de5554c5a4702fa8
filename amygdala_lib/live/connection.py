"""Connection: authenticated requests to one server, and its refusals in its own words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..errors import LiveError
from .jobs import Refusal
from .private import read_private

TOKEN, RUNTIME = "AMYGDALA_TOKEN", "AMYGDALA_RUNTIME"
_PATH = "/v1/amygdala"
_HEADER = "X-Amygdala-Token"
_LONGEST_TOKEN = 4096  # bytes of its file


class Connection:
    """To the endpoints of a server, by address and token; see `Client`.

    Raises LiveError for what is no address, and where a token would go over the network in clear.
    """

    def __init__(
        self, url: str, token: str | None, *, api_key: str | None, timeout: float, insecure: bool
    ):
        token = token or found_token()
        self.url, self._key = url, api_key or token
        socket, self._base, local = _address(url)
        if not (local or insecure or self._base.startswith("https:")):
            raise LiveError(
                f"{url} is plain HTTP to another machine, where the token could be read on the "
                "way: use https, an SSH tunnel to the server's port, or insecure=True"
            )
        self._socket, self._trust_env = socket, not local  # a proxy is not for this machine
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        headers |= {_HEADER: token} if token else {}
        self._http = self._client(base_url=self._base, headers=headers, timeout=timeout)

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, content: Any = None, **options: Any) -> dict[str, Any]:
        """The server's answer.

        Raises Refusal with its words, and the kind of refusal; LiveError if there is no answer.
        """
        try:
            answer = self._http.request(method, _PATH + path, json=content, **options)
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise LiveError(
                f"no answer from {self.url} ({said}): is the server running? `amygdala serve` "
                "starts one"
            ) from error
        except ValueError as error:  # before anything is sent: NaN is no JSON
            raise LiveError(f"{path[1:]} cannot be sent: {error}") from error
        try:
            found = answer.json()
        except ValueError:
            found = None
        if answer.is_success and isinstance(found, dict):
            return found
        raise _refusal(answer.status_code, found, self.url + _PATH + path)

    def openai_options(self) -> dict[str, Any]:
        """What the `openai` package's client needs to speak to the same server."""
        return {
            "base_url": f"{self._base}/v1",
            "api_key": self._key or "none",
            "http_client": self._client(),
        }

    def _client(self, **options: Any) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=self._socket) if self._socket else None
        return httpx.Client(transport=transport, trust_env=self._trust_env, **options)


def found_token() -> str | None:
    """AMYGDALA_TOKEN, or what the file `token` in the folder AMYGDALA_RUNTIME holds.

    Raises LiveError if that file is open to others.
    """
    if token := os.environ.get(TOKEN):
        return token
    if runtime := os.environ.get(RUNTIME):
        path = Path(runtime) / "token"
        if path.exists():
            return read_token(path)
    return None


def read_token(path: Path) -> str:
    """Raises LiveError if the file is not there, or not this user's alone."""
    return read_private(path, _LONGEST_TOKEN).decode().strip()


def _address(url: str) -> tuple[str | None, str, bool]:
    """The unix socket, if it is one; the base of all addresses; whether it is this machine."""
    if url.startswith("unix:"):
        return url.removeprefix("unix:").replace("//", "/", 1), "http://localhost", True
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LiveError(f"{url} is no address: give http://127.0.0.1:8000 or unix:/path/to/socket")
    return None, url.rstrip("/").removesuffix("/v1"), _is_here(parts.hostname)


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _refusal(status: int, found: Any, address: str) -> Refusal:
    """The error a server has answered with; of one without the plugin, vLLM's own."""
    told = found if isinstance(found, Mapping) else {}
    said = told.get("error", told.get("detail")) or "(nothing that can be read)"
    if isinstance(said, Mapping):
        said = said.get("message", said)
    hints = {
        401: f". The token is what `amygdala serve` has printed: `token`, or {TOKEN}",
        404: "" if "kind" in told else ". `amygdala serve` starts servers that have this",
    }
    kinds = {401: "invalid", 404: "unknown", 409: "busy", 429: "full", 503: "down"}
    kind = told.get("kind") or kinds.get(status, "invalid" if status < 500 else "failed")
    return Refusal(kind, f"{address} answered {status}: {said}{hints.get(status, '')}")
