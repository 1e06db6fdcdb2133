"""Servers that look like S3 and misbehave as they are told."""

from __future__ import annotations

import http.client
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SECRET = "do-not-show-this-anywhere"


class Faulty:
    """An HTTP server before another, or before one object, that misbehaves as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                faulty.seen.append((self.command, self.path, self.headers.get("Range")))
                faulty.handle(self, body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        self.seen: list[tuple[str, str, str | None]] = []

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args):  # a client that hung up is what is wanted here
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{self.server.server_port}")

    def handle(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        raise NotImplementedError


class Object(Faulty):
    """Serves one object; sends only `cuts[n]` bytes of the n-th answer, and then hangs up."""

    def __init__(self, monkeypatch, data: bytes, cuts: list[int], etags: list[str] | None = None):
        super().__init__(monkeypatch)
        self.data, self.cuts, self.etags = data, list(cuts), list(etags or [])
        self.honours_range = self.honours_if_match = True
        self.status_first: list[int] = []
        self.stall: list[float] = []

    def handle(self, request, body):
        if self.status_first:
            request.send_error(self.status_first.pop(0))
            request.close_connection = True
            return
        etag = self.etags.pop(0) if self.etags else '"v1"'
        wanted = request.headers.get("If-Match")
        if self.honours_if_match and wanted not in (None, etag):
            request.send_error(412)
            return
        part, ranged = self.data, request.headers.get("Range")
        if ranged and self.honours_range:
            start, stop = re.fullmatch(r"bytes=(\d+)-(\d*)", ranged).groups()
            part = self.data[int(start) : int(stop) + 1 if stop else None]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-x/{len(self.data)}")
        else:
            request.send_response(200)
        request.send_header("ETag", etag)
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        sent = self.cuts.pop(0) if self.cuts else len(part)
        request.wfile.write(part[:sent])
        request.wfile.flush()
        if self.stall:
            threading.Event().wait(self.stall.pop(0))
        request.close_connection = sent < len(part)


DATA = bytes(range(256)) * 20_000  # 5 MB


class Refusing(Faulty):
    """Refuses with a code while it does not like the key's session token."""

    def __init__(self, monkeypatch, status: int, code: str, liked: str = ""):
        super().__init__(monkeypatch)
        self.status, self.code, self.liked = status, code, liked

    def handle(self, request, body):
        liked = self.liked and request.headers["x-amz-security-token"] == self.liked
        text = "found" if liked else f"<Error><Code>{self.code}</Code></Error>"
        request.send_response(200 if liked else self.status)
        request.send_header("Content-Length", str(len(text)))
        request.send_header("ETag", '"1"')
        request.end_headers()
        request.wfile.write(text.encode())


class Proxy(Faulty):
    """Passes requests on, except those whose path matches `refuse`; loses some answers."""

    def __init__(self, monkeypatch, port: int):
        super().__init__(monkeypatch)
        self.port, self.refuse, self.lose = port, "", 0

    def handle(self, request, body):
        if self.refuse and re.search(self.refuse, request.path):
            request.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.port)
        upstream.request(request.command, request.path, body, dict(request.headers))
        answer = upstream.getresponse()
        content = answer.read()
        if self.lose:
            self.lose -= 1
            request.close_connection = True
            return
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)
