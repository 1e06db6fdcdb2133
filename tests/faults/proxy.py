"""A proxy in front of an S3 server that causes faults; it passes all other requests on unchanged.

    with S3Proxy(server.endpoint) as proxy:
        proxy.add(reset, path=r"shards/", times=2, after=1000)

Signatures cover the Host header, so it is passed on as the client sent it.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_OWN_HEADERS = {"transfer-encoding", "connection", "date", "server"}


@dataclass
class Request:
    """A client's request, and ways to answer it."""

    handler: BaseHTTPRequestHandler
    body: bytes
    ask: Callable[[bytes], tuple[int, list[tuple[str, str]], bytes]]
    """Sends the request with this body to the real server; returns status, headers and body."""

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Send an answer whole."""
        self.send_head(status, headers, len(body))
        self.send(body)

    def send_head(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
        """Send status and headers; the length is the one that the server announced, if it did."""
        announced = [value for name, value in headers if name.lower() == "content-length"]
        self.handler.send_response(status)
        for name, value in headers:
            if name.lower() not in _OWN_HEADERS | {"content-length"}:
                self.handler.send_header(name, value)
        self.handler.send_header("Content-Length", announced[0] if announced else str(length))
        self.handler.end_headers()

    def send(self, body: bytes) -> None:
        """Send a part of the body."""
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body)
            self.handler.wfile.flush()

    def hang_up(self) -> None:
        """Close the connection with a reset."""
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.close_connection = True
        # The handler's files hold the socket open; shutting down would send a mere end.
        self.handler.connection.close()
        self.handler.wfile = open("/dev/null", "wb")  # noqa: SIM115
        with contextlib.suppress(OSError):
            self.handler.rfile.close()


def refuse(request: Request, *, status: int, code: str) -> None:
    """Answer with an S3 error without asking the real server."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>x</Message></Error>"
    request.answer(status, [("Content-Type", "application/xml")], body.encode())


def reset(request: Request, *, after: int = 0) -> None:
    """Reset the connection after so many bytes of the answer's body."""
    status, headers, body = request.ask(request.body)
    if after:
        request.send_head(status, headers, len(body))
        request.send(body[:after])
    request.hang_up()


def truncate(request: Request, *, after: int) -> None:
    """Announce the whole body, send so many bytes of it, and close the connection normally."""
    status, headers, body = request.ask(request.body)
    request.send_head(status, headers, len(body))
    request.send(body[:after])
    request.handler.close_connection = True


def stall(request: Request, *, after: int, seconds: float) -> None:
    """Send so many bytes of the body, and then nothing for a while."""
    status, headers, body = request.ask(request.body)
    request.send_head(status, headers, len(body))
    request.send(body[:after])
    time.sleep(seconds)
    request.handler.close_connection = True


def trickle(request: Request, *, pieces: int, pause: float) -> None:
    """Send the body in pieces with pauses: a slow link."""
    status, headers, body = request.ask(request.body)
    request.send_head(status, headers, len(body))
    step = max(1, -(-len(body) // pieces))
    for start in range(0, len(body), step):
        time.sleep(pause)
        request.send(body[start : start + step])


def flip_answer(request: Request, *, at: float = 0.5) -> None:
    """Flip a bit of the answer's body."""
    status, headers, body = request.ask(request.body)
    request.answer(status, headers, _flipped(body, at))


def flip_request(request: Request, *, at: float = 0.5) -> None:
    """Flip a bit of the request's body on its way to the server."""
    request.answer(*request.ask(_flipped(request.body, at)))


def lose_answer(request: Request) -> None:
    """Let the server handle the request, and reset the connection instead of answering."""
    request.ask(request.body)
    request.hang_up()


def _flipped(body: bytes, at: float) -> bytes:
    changed = bytearray(body)
    if changed:
        changed[int(at * len(changed))] ^= 1
    return bytes(changed)


@dataclass
class Fault:
    """A fault, and the requests that it affects.

    Args:
        act: one of this module's functions.
        method: a pattern of the HTTP method, such as `GET|HEAD`.
        path: a pattern that is searched for in path and query.
        skip: matching requests that go through first.
        times: matching requests that it then happens to; None is for ever.
        options: further arguments of `act`.
    """

    act: Callable[..., None]
    method: str
    path: str
    skip: int
    times: int | None
    options: dict[str, Any]
    hits: int = 0


@dataclass
class S3Proxy:
    """The proxy; its address stays the same while it is `down`.

    Args:
        upstream: the address of the server behind, such as `http://127.0.0.1:40123`.
    """

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""

    def __enter__(self) -> S3Proxy:
        self._lock = threading.Lock()
        self._port = 0
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def endpoint(self) -> str:
        """For `AWS_ENDPOINT_URL`."""
        return f"http://127.0.0.1:{self._port}"

    def add(
        self,
        act: Callable[..., None],
        *,
        method: str = "",
        path: str = "",
        skip: int = 0,
        times: int | None = 1,
        **options: Any,
    ) -> Fault:
        """Cause a fault in the next requests that match; see `Fault`."""
        fault = Fault(act, method, path, skip, times, options)
        with self._lock:
            self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """Cause no more faults."""
        with self._lock:
            self.faults.clear()
            self.seen.clear()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections inside the block."""
        self._close()
        try:
            yield
        finally:
            self._listen()

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.seen.append((method, path))
            for fault in self.faults:
                if re.search(fault.path, path) and re.search(fault.method, method):
                    if fault.skip > 0:
                        fault.skip -= 1
                    elif fault.times is None or fault.hits < fault.times:
                        fault.hits += 1
                        return fault
        return None

    def _listen(self) -> None:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                request = Request(self, _body(self), lambda body: proxy._ask(self, body))
                fault = proxy._fault(self.command, self.path)
                if proxy._server is not server:  # a connection from before it went down
                    request.hang_up()
                elif fault is None:
                    request.answer(*request.ask(request.body))
                else:
                    fault.act(request, **fault.options)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = answer

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:  # a client that hung up is meant to
                pass

        self._server = server = Server(("127.0.0.1", self._port), Handler)
        self._port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def _close(self) -> None:
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()

    def _ask(self, handler: BaseHTTPRequestHandler, body: bytes):
        upstream = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=60)
        headers = {
            k: v for k, v in handler.headers.items() if k.lower() not in _OWN_HEADERS - {"date"}
        }
        headers.pop("Expect", None)
        if "chunked" in handler.headers.get("Transfer-Encoding", ""):
            headers["Content-Length"] = str(len(body))
        upstream.request(handler.command, handler.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        return answer.status, answer.getheaders(), content


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    body = bytearray()
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return bytes(body)
