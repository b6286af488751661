"""An HTTP server on the loopback interface: good, slow, cut, redirecting or wrong."""

import contextlib
import hashlib
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Page:
    """The answer of one path. `statuses` are given first, one per request; then `body`."""

    body: bytes
    ranges: bool = True
    etag: str | None = "hash"  # "hash": of the body; None: no entity tag
    last_modified: str | None = None
    cut_after: int | None = None  # bytes of an answer after which the connection is cut
    cuts: int = 10**9  # how many answers are cut
    seconds_per_chunk: float = 0.0
    chunk: int = 64 * 1024
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    redirect: str | None = None
    wrong_range: bool = False  # answers 206 with other bytes than asked for
    ignore_if_range: bool = False
    no_length: bool = False
    raw: Iterable[bytes] | None = None  # bytes sent in place of any answer, `seconds_per_chunk` apart


class Server:
    """Serves `pages` by path; counts requests and the bytes of bodies that it sent."""

    def __init__(self, http: ThreadingHTTPServer, scheme: str) -> None:
        self._http = http
        self.base = f"{scheme}://localhost:{http.server_address[1]}"
        self.pages: dict[str, Page] = {}
        self.sent = 0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()

    def add(self, path: str, body: bytes, **how: object) -> str:
        """Serve `body` at `path`; its address."""
        self.pages[path] = Page(body, **how)  # type: ignore[arg-type]
        return f"{self.base}{path}"

    def forget(self) -> None:
        self.sent = 0
        self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "loopback"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server: Server = self.server.owner  # type: ignore[attr-defined]
        with server.lock:
            server.requests.append((self.path, dict(self.headers)))
            page = server.pages.get(self.path)
            status = page.statuses.pop(0) if page and page.statuses else None
        self.close_connection = True
        if page is None:
            self._short(404, {})
        elif status is not None:
            self._short(*status)
        elif page.raw is not None:
            for piece in page.raw:
                self.wfile.write(piece)
                time.sleep(page.seconds_per_chunk)
        elif page.redirect is not None:
            self._short(302, {"Location": page.redirect})
        else:
            self._page(server, page)

    def _short(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _page(self, server: Server, page: Page) -> None:
        total = len(page.body)
        etag = f'"{hashlib.sha256(page.body).hexdigest()[:16]}"' if page.etag == "hash" else page.etag
        start, stop = 0, total
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        fresh = page.ignore_if_range or condition in (None, etag, page.last_modified)
        partial = bool(asked and page.ranges and fresh)
        if partial:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, total - int(last))
            stop = min(int(last) + 1, total) if first and last else total
            if start >= total:
                self._short(416, {"Content-Range": f"bytes */{total}"})
                return
            if page.wrong_range:
                start = max(0, start - 7)
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        if not page.no_length:
            self.send_header("Content-Length", str(stop - start))
        if etag:
            self.send_header("ETag", etag)
        if page.last_modified:
            self.send_header("Last-Modified", page.last_modified)
        self.send_header("Connection", "close")
        self.end_headers()
        cut = page.cut_after is not None and page.cuts > 0
        end = min(stop, start + page.cut_after) if cut and page.cut_after is not None else stop
        page.cuts -= cut
        with contextlib.suppress(ConnectionError):
            while start < end:
                piece = page.body[start : min(start + page.chunk, end)]
                with server.lock:  # before the client can have it, and so before a test can ask
                    server.sent += len(piece)
                try:
                    self.wfile.write(piece)
                except ConnectionError:
                    with server.lock:
                        server.sent -= len(piece)
                    raise
                start += len(piece)
                if page.seconds_per_chunk:
                    time.sleep(page.seconds_per_chunk)


class _Threads(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away, or refuses the certificate, is what the tests want."""


@contextlib.contextmanager
def serving(*, certificate: tuple[Path, Path] | None = None) -> Iterator[Server]:
    """A running server; with a certificate and its key, by HTTPS."""
    http = _Threads(("127.0.0.1", 0), _Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*map(str, certificate))
        http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    server = Server(http, "https" if certificate else "http")
    http.owner = server  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for "localhost" signed by itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *(
                "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-out", str(certificate), "-keyout", str(key)),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return certificate, key


@contextlib.contextmanager
def rtsp_serving(parts: list[list[bytes]]) -> Iterator[str]:
    """The address of an RTSP server that sends one of `parts`, MPEG-TS, in turn per PLAY, over TCP; then it refuses."""
    listener = socket.create_server(("127.0.0.1", 0))
    session = b"v=0\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"

    def answer(connection: socket.socket) -> None:
        lines = connection.makefile("rb")
        while request := lines.readline():
            header = dict(line.split(b": ", 1) for line in iter(lambda: lines.readline().strip(), b""))
            verb, body, extra = request.split()[0], b"", b"Session: 1\r\n"
            if verb == b"DESCRIBE":
                body, extra = session, b"Content-Type: application/sdp\r\n"
            elif verb == b"SETUP":
                extra += b"Transport: %s\r\n" % header[b"Transport"]
            status = b"200 OK" if parts else b"404 Not Found"
            head = b"RTSP/1.0 %s\r\nCSeq: %s\r\n%sContent-Length: %d\r\n\r\n"
            connection.sendall(head % (status, header[b"CSeq"], extra, len(body)) + body)
            if verb == b"PLAY":
                data = b"".join(parts.pop(0))
                for number, start in enumerate(range(0, len(data), 7 * 188)):
                    packet = struct.pack(">BBHII", 0x80, 33, number, 0, 1) + data[start : start + 7 * 188]
                    connection.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
                break
        connection.close()

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield f"rtsp://user:secret@127.0.0.1:{listener.getsockname()[1]}/live"
