"""One HTTP request, with TLS always verified, and its failure named as worth another attempt or not."""

from __future__ import annotations

import email.utils
import http.client
import random
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from pathlib import Path
from typing import IO, Final

from tvit_cli import __version__

OK, PARTIAL, RANGE_NOT_SATISFIABLE = 200, 206, 416
# RFC 9110 and 6585: the same request may be answered later.
LATER: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class Refused(Exception):
    """This address will not serve the file; another one may."""


class Broken(Exception):
    """This attempt failed; the next may not. `after` is the server's wish, in seconds."""

    def __init__(self, message: str, *, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class Retry:
    """How long to go on: exponential back-off with jitter, a server's Retry-After up to a bound."""

    attempts: int = 6  # without a byte more than before
    first_seconds: float = 1.0
    most_seconds: float = 30.0
    most_retry_after: float = 120.0
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random  # in [0, 1); moves the wait by ± 25 %

    def wait(self, attempt: int, failure: Broken) -> None:
        """Wait before another attempt; raise Refused where there is none, or the wait would be too long."""
        if attempt >= self.attempts:
            raise Refused(f"{failure} ({attempt} attempts)")
        seconds = min(self.most_seconds, self.first_seconds * 2 ** (attempt - 1)) * (0.75 + self.jitter() / 2)
        if failure.after is not None:
            if failure.after > self.most_retry_after:
                raise Refused(
                    f"{failure}, asks to wait {failure.after:.0f} s (limit {self.most_retry_after:.0f} s)"
                )
            seconds = max(seconds, failure.after)
        self.sleep(seconds)


def system_trust() -> ssl.SSLContext:
    """The system's certificates; certifi's where this Python was built without any (python.org on macOS)."""
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if not context.cert_store_stats()["x509_ca"] and not paths.cafile and not paths.capath:
        try:
            import certifi  # comes with huggingface_hub; imported only where the system has no store
        except ImportError:
            return context
        context.load_verify_locations(certifi.where())
    return context


class Response:
    """What a server answered; a context manager. Reading raises Broken where the connection breaks."""

    def __init__(
        self, raw: http.client.HTTPResponse | None, *, status: int, headers: Message, url: str
    ) -> None:
        self._raw = raw
        self.status = status
        self.url = url
        self.etag = headers.get("ETag")
        self.last_modified = headers.get("Last-Modified")
        self.length = _number(headers.get("Content-Length"))
        # Content-Range: bytes 5-9/10, or bytes */10
        unit, _, span = (headers.get("Content-Range") or "").partition(" ")
        first, _, total = span.partition("/")
        self.start = _number(first.partition("-")[0]) if unit == "bytes" else None
        self.total = _number(total) if unit == "bytes" else None

    def read(self, size: int) -> bytes:
        """The next bytes, as they come: at most `size`, none at the end."""
        try:
            return self._raw.read1(size) if self._raw else b""
        except (http.client.HTTPException, OSError) as error:
            raise Broken(f"connection lost ({_reason(error)})") from error

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        if self._raw:
            self._raw.close()


@dataclass(frozen=True)
class Http:
    """Opens addresses. `trust` is handed in by tests; a context that does not verify is refused."""

    trust: ssl.SSLContext | None = None
    timeout: float = 30.0  # seconds without a byte
    retry: Retry = field(default_factory=Retry)

    @cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        trust = self.trust or system_trust()
        if trust.verify_mode is not ssl.CERT_REQUIRED or not trust.check_hostname:
            raise ValueError("an SSL context that does not verify certificates is never used")
        return urllib.request.build_opener(urllib.request.HTTPSHandler(context=trust), _Redirects())

    def open(self, url: str, *, headers: Mapping[str, str] | None = None) -> Response:
        """Answer of `url`, status 200, 206 or 416, redirects followed. Raises Refused, Broken."""
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise Refused("its address is neither http nor https")
        request = urllib.request.Request(
            url,
            headers={"User-Agent": f"tvit/{__version__}", "Accept-Encoding": "identity", **(headers or {})},
        )
        try:
            raw = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == RANGE_NOT_SATISFIABLE:
                    return Response(None, status=error.code, headers=error.headers, url=url)
                message = f"HTTP {error.code} {error.reason}"
                if error.code in LATER:
                    raise Broken(message, after=_retry_after(error.headers.get("Retry-After"))) from error
                raise Refused(message) from error
        except (http.client.HTTPException, OSError) as error:  # URLError is an OSError
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise Refused(
                    f"its TLS certificate does not verify ({cause.verify_message}); "
                    "that check is never turned off"
                ) from error
            raise Broken(f"no connection ({_reason(cause)})") from error
        return Response(raw, status=raw.status, headers=raw.headers, url=raw.url)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to an address that is not verified."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme != "https"):
            fp.close()
            raise Refused(f"redirects from {req.type} to {scheme}: {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def file_name(url: str) -> str:
    """Last part of an address's path. "https://a.org/x/UCF101.rar?download=1" -> "UCF101.rar"."""
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    seconds = _number(value)
    if seconds is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def _reason(error: object) -> str:
    return str(error) or type(error).__name__
