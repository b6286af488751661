"""HTTP requests with verified TLS and retries, and resumable downloads from mirrors.

Note [Resuming a partial file]
A download resumes from `.<name>.part` only if the remaining bytes belong to the bytes on disk. The same URL proves
it by its entity tag or date (If-Range: a changed file is sent whole). Another mirror, or a URL without either, can
prove it only afterwards, by a known sha256; without one the download starts over. A file that was assembled from
several responses and has a wrong hash is fetched once more from the same URL before that URL fails.
"""

from __future__ import annotations

import http.client
import io
import json
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from tvit_cli import __version__, files
from tvit_cli.errors import RunError, size_text
from tvit_cli.results import Note, Progress, Report, silent

T = TypeVar("T")
OK, PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 200, 206, 416
CHUNK_BYTES: Final = 256 * 1024
HEADER_BYTES: Final = 256 * 1024  # limit of headers, interim responses and trailers, which http.client lacks
UNDECLARED_BYTES: Final = 2 * 1024**3  # limit of a file whose size neither the caller nor the server states
PATIENCE: Final = 60.0  # seconds until the headers are complete; also the window of LEAST_RATE
LEAST_RATE: Final = 1000  # bytes per second; a slower attempt has failed
MAX_REDIRECTS: Final = 10
# RFC 9110 and 6585: the same request may succeed later.
TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class PermanentError(Exception):
    """A URL cannot serve the file; another URL may."""


class TransientError(Exception):
    """A failed attempt that may succeed later; `after` is the server's Retry-After in seconds."""

    def __init__(self, message: str, *, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class MirrorsFailed(RunError):
    """No URL served the file; `reasons` lists (URL, reason) in the order of the attempts."""

    def __init__(self, name: str, reasons: Sequence[tuple[str, str]], *, advice: str) -> None:
        self.reasons = tuple(reasons)
        lines = "".join(f"\n  {url}: {reason}" for url, reason in reasons)
        super().__init__(f"{name}: could not be fetched from any source:{lines}\n{advice}")


@dataclass(frozen=True)
class Retry:
    """Exponential back-off with jitter; honours Retry-After up to a limit."""

    attempts: int = 6  # in a row, each below LEAST_RATE
    first_seconds: float = 1.0
    most_seconds: float = 30.0
    most_retry_after: float = 120.0
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random  # in [0, 1); varies the delay by ± 25 %

    def run(
        self, step: Callable[[], T], received: Callable[[], int], url: str = "", report: Report = silent
    ) -> T:
        """Repeats `step` on TransientError; `received` returns the bytes so far. Raises PermanentError."""
        most, attempt, since = received(), 0, time.monotonic()
        while True:
            try:
                return step()
            except TransientError as failure:
                now = time.monotonic()
                attempt = 1 if received() - most > LEAST_RATE * (now - since) else attempt + 1
                most, since = max(most, received()), now
                self.wait(attempt, failure, url, report)

    def wait(self, attempt: int, failure: TransientError, url: str = "", report: Report = silent) -> None:
        """Waits before the next attempt. Raises PermanentError after the last one, or if the wait is too long."""
        if attempt >= self.attempts:
            raise PermanentError(f"{failure} ({attempt} attempts)")
        seconds = min(self.most_seconds, self.first_seconds * 2 ** (attempt - 1)) * (0.75 + self.jitter() / 2)
        after, limit = failure.after or 0, self.most_retry_after
        if after > limit:
            raise PermanentError(f"{failure}, asks to wait {after:.0f} s (limit {limit:.0f} s)")
        seconds = max(seconds, after)
        report(Note(f"{url}: {failure}; attempt {attempt + 1} of {self.attempts} in {seconds:.0f} s"))
        self.sleep(seconds)


class Response(AbstractContextManager["Response"]):
    """Status, headers and unread body of a response."""

    def __init__(self, raw: urllib3.BaseHTTPResponse) -> None:
        self._raw = raw
        self.status = raw.status
        self.etag = raw.headers.get("ETag")
        self.last_modified = raw.headers.get("Last-Modified")
        length = re.fullmatch("([0-9]+)", raw.headers.get("Content-Length", ""))
        span = re.fullmatch(r"bytes (?:([0-9]+)-.*|\*)/(?:([0-9]+)|\*)", raw.headers.get("Content-Range", ""))
        # 19 digits exceed any disk, and int() refuses thousands of them.
        self.length = int(length[1][:19]) if length else None
        self.start = int(span[1][:19]) if span and span[1] else None
        self.total = int(span[2][:19]) if span and span[2] else None
        self._since, self._received = time.monotonic(), 0

    def read(self, size: int) -> bytes:
        """The next bytes as they arrive: at most `size`, none at the end. Raises TransientError."""
        now = time.monotonic()
        if (seconds := now - self._since) > PATIENCE:
            if self._received < LEAST_RATE * seconds:
                raise TransientError(f"{self._received} bytes in {seconds:.0f} s, too slow")
            self._since, self._received = now, 0
        try:
            chunk = self._raw.read1(size)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _failure("connection lost", error) from error
        self._received += len(chunk)
        return chunk

    def __exit__(self, *_: object) -> None:
        self._raw.close()


class _BoundedFile(io.RawIOBase):
    """The bytes of a connection, with limits in bytes and time that `allow` renews."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__()
        self._raw = raw
        self.allow(0)

    def allow(self, size: int) -> None:
        """Allows `size` bytes of the body, and headers, within PATIENCE."""
        self._left, self._deadline = size + HEADER_BYTES, time.monotonic() + PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._left <= 0:
            raise OSError(f"headers or trailers of more than {HEADER_BYTES} bytes")
        if time.monotonic() > self._deadline:
            raise OSError(f"headers or trailers not complete after {PATIENCE:.0f} s")
        count = self._raw.readinto(buffer)
        self._left -= count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """A response whose headers, and each read of whose body, are bounded in bytes and time."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._bounded = _BoundedFile(self.fp.detach())
        self.fp = io.BufferedReader(self._bounded)

    def read1(self, n: int = -1) -> bytes:
        self._bounded.allow(max(0, n))
        return super().read1(n)


@dataclass(frozen=True)
class Http:
    """HTTP client. `trust` replaces the certificates of the system (if it has none: of certifi).

    A context without verification is refused.
    """

    trust: ssl.SSLContext | None = None
    timeout: float = 30.0  # seconds without a byte
    retry: Retry = field(default_factory=Retry)

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        trust, paths = self.trust or ssl.create_default_context(), ssl.get_default_verify_paths()
        has_roots = trust.cert_store_stats()["x509_ca"] or paths.cafile or paths.capath
        if self.trust is None and not has_roots:  # python.org's Python on macOS
            with suppress(ImportError):
                import certifi

                trust.load_verify_locations(certifi.where())
        if trust.verify_mode is not ssl.CERT_REQUIRED or not trust.check_hostname:
            raise ValueError("an SSL context without certificate verification is never used")
        return trust

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> Response:
        """Response of `url` with status 200, 206 or 416, after redirects. Raises PermanentError, TransientError."""
        for _ in range(MAX_REDIRECTS + 1):
            raw = self._request(url, headers or {})
            if raw.status in (OK, PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE):
                return Response(raw)
            raw.close()
            message = f"HTTP {raw.status} {raw.reason}"
            if raw.status in TRANSIENT:
                with suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
                    after = urllib3.Retry().get_retry_after(raw) or 0
                    raise TransientError(message, after=min(after, 1e6))
                raise TransientError(message)
            if not (location := raw.get_redirect_location()):
                raise PermanentError(message)
            try:
                target = urljoin(url, location)
                scheme = urlsplit(target).scheme
            except ValueError as error:
                raise PermanentError(f"redirects to {location[:200]!r}, which is no URL ({error})") from error
            if urlsplit(url).scheme == "https" and scheme != "https":
                raise PermanentError(f"redirects from https to {scheme}: {target}")
            url = target
        raise PermanentError(f"{message} more than {MAX_REDIRECTS} times")

    def _request(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        if urlsplit(url).scheme not in ("http", "https"):
            raise PermanentError(f"its URL {url[:200]} is neither http nor https")
        # An idle connection may be closed by the server at any time.
        always = {"User-Agent": f"tvit/{__version__}", "Accept-Encoding": "identity", "Connection": "close"}
        try:
            return self._pool(url).urlopen(
                "GET",
                url,
                headers={**always, **headers},
                redirect=False,
                retries=False,  # See Note [Resuming a partial file]: a retry needs another Range
                preload_content=False,
                decode_content=False,
                enforce_content_length=False,
                timeout=self.timeout,
            )
        except (urllib3.exceptions.LocationValueError, UnicodeError) as error:
            raise PermanentError(f"malformed URL ({str(error)[:200]})") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _failure("no connection", error) from error

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Connections to a host, or to the proxy that the environment names for it."""
        parts = urlsplit(url)
        proxy = getproxies().get(parts.scheme)
        if not proxy or proxy_bypass(parts.netloc):
            manager = urllib3.PoolManager(ssl_context=self._trust)
        else:
            proxy = proxy if "://" in proxy else f"http://{proxy}"
            login = urllib3.util.parse_url(proxy).auth
            proxy_headers = urllib3.make_headers(proxy_basic_auth=unquote(login)) if login else None
            manager = urllib3.ProxyManager(proxy, proxy_headers=proxy_headers, ssl_context=self._trust)
        pool = manager.connection_from_url(url)  # the one that urlopen will take
        pool.ConnectionCls = type(
            "BoundedConnection", (pool.ConnectionCls,), {"response_class": _BoundedResponse}
        )
        return manager


def _failure(event: str, error: BaseException) -> PermanentError | TransientError:
    while cause := error.__cause__ or error.__context__:
        error = cause
    if isinstance(error, ssl.SSLCertVerificationError):
        return PermanentError(f"its TLS certificate does not verify ({error.verify_message}), as required")
    return TransientError(f"{event} ({str(error).strip() or type(error).__name__})")


@dataclass(frozen=True)
class Fetched:
    """Source of a complete file. `bytes_received`: in this run; `verified`: its hash was known in advance."""

    url: str
    bytes: int
    sha256: str
    verified: bool
    bytes_received: int = 0
    etag: str | None = None


def is_fetched(target: Path, sha256: str | None = None) -> bool:
    """Whether a fetch wrote this file, by the record beside it, with this sha256 if given."""
    record = _read_object(_beside(target, "source.json"))
    return "sha256" in record and sha256 in (None, record["sha256"])


def fetch_files(target: Path) -> list[str]:
    """Names of the files that a fetch leaves in a folder: the target, if fetched, and those beside it."""
    own = [target.name] if is_fetched(target) else []
    beside = [f".{target.name}.{end}" for end in ("part", "lock", "part.json", "source.json")]
    return [*own, *(f".{name}.new" for name in beside), *beside]  # the record last


def _beside(target: Path, end: str) -> Path:
    return target.with_name(f".{target.name}.{end}")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


@dataclass
class _Origin:
    """The response that a partial file came from; stored beside it."""

    url: str = ""
    etag: str | None = None
    last_modified: str | None = None
    total: int | None = None

    @property
    def validator(self) -> str | None:
        """Value for If-Range: a strong entity tag, else the date."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def is_same_file(self, response: Response) -> bool:
        """Whether entity tag, date and size of a partial response agree with the first response."""
        dates, sizes = {self.last_modified, response.last_modified}, {self.total, response.total}
        return self.etag in (None, response.etag) and len(dates - {None}) < 2 and len(sizes - {None}) < 2


class _PartialFile:
    def __init__(self, target: Path) -> None:
        self.path, self.origin_path = _beside(target, "part"), _beside(target, "part.json")
        self.is_mixed = self.length > 0  # not all bytes are from one response of this run
        self.origin = _Origin()
        with suppress(TypeError):
            self.origin = _Origin(**_read_object(self.origin_path))
        if not self.origin.url:
            self.discard()  # bytes of unknown origin

    @property
    def length(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.origin_path.unlink(missing_ok=True)
        self.origin, self.is_mixed = _Origin(), False


@dataclass
class Download:
    """A file to fetch to `target`, with its `size` (bytes) and `sha256` if known."""

    target: Path
    size: int | None = None
    sha256: str | None = None
    http: Http = field(default_factory=Http)
    report: Report = silent
    _received: int = field(default=0, init=False)

    def fetch(self, urls: Sequence[str]) -> Fetched:
        """Fetches the file from the first URL that serves it; a correct file on disk needs no request.

        Raises MirrorsFailed, and RunError if the disk is too small, fills up, or another process fetches the file.
        """
        busy = f"{self.target}: another process is fetching it. Wait until it ends, then repeat this command."
        with files.file_lock(_beside(self.target, "lock"), busy):
            return self._existing() or self._from_any(urls)

    def _existing(self) -> Fetched | None:
        """The target if it is correct; a fetched one of another size or hash is removed. Raises RunError."""
        if not self.target.is_file():
            return None
        size, sha256 = self.target.stat().st_size, files.sha256(self.target)
        if sha256 != (self.sha256 or sha256) or size != (self.size or size):
            found = f"{self.target}: {size} bytes, sha256 {sha256}, is not the expected file"
            if not is_fetched(self.target, sha256):
                raise RunError(f"{found} and not from tvit. Move it away and run the same command again.")
            self.report(Note(f"{found}; fetching it again"))
            self.target.unlink()
            return None
        url = str(_read_object(_beside(self.target, "source.json")).get("url", self.target.name))
        return Fetched(url, size, sha256, self.sha256 is not None)

    def _from_any(self, urls: Sequence[str]) -> Fetched:
        part = _PartialFile(self.target)
        reasons: list[tuple[str, str]] = []
        for url in urls:
            try:
                attempt = partial(self._attempt, url, part)
                return self.http.retry.run(attempt, lambda: part.length, url, self.report)
            except PermanentError as failure:
                reasons.append((url, str(failure)))
                self.report(Note(f"{url}: {failure}"))
        advice = "Try again later, or give a file that you already have with --archive."
        if part.length:
            advice += f" {size_text(part.length)} are kept in {part.path} for the next run."
        raise MirrorsFailed(self.target.name, reasons, advice=advice)

    def _attempt(self, url: str, part: _PartialFile) -> Fetched:
        self._receive(url, part)
        part.path.touch()  # no bytes were written for an empty file
        size, sha256 = part.length, files.sha256(part.path)
        if self.size not in (None, size):
            mismatch = f"sent {size} bytes, {self.size} are expected"
        elif self.sha256 not in (None, sha256):
            mismatch = f"sent a file of sha256 {sha256}, {self.sha256} is expected"
        else:
            files.write_json(_beside(self.target, "source.json"), {"url": url, "sha256": sha256})
            files.rename(part.path, self.target)
            part.origin_path.unlink(missing_ok=True)
            return Fetched(url, size, sha256, self.sha256 is not None, self._received, part.origin.etag)
        mixed = TransientError(f"{mismatch}, assembled from several responses")
        failure = mixed if part.is_mixed else PermanentError(mismatch)  # See Note [Resuming a partial file]
        part.discard()
        raise failure

    def _receive(self, url: str, part: _PartialFile) -> None:
        validator = part.origin.validator if part.origin.url == url else None
        is_too_long = self.size is not None and part.length > self.size
        # See Note [Resuming a partial file].
        if part.length == 0 or is_too_long or not (validator or self.sha256):
            part.discard()
        if part.length and part.length == (self.size or part.origin.total):
            return
        headers = {"Range": f"bytes={part.length}-"} if part.length else {}
        if part.length and validator:
            headers["If-Range"] = validator
        with self.http.open(url, headers) as response:
            total = self._check_response(url, response, part)
            if total is None or total > part.length:
                self._append_body(response, part, total)

    def _check_response(self, url: str, response: Response, part: _PartialFile) -> int | None:
        """Total bytes of the file as the response declares; `part` is emptied if the response starts at 0."""
        if response.status == RANGE_NOT_SATISFIABLE:
            if self.sha256 and part.length and response.total == part.length:
                part.is_mixed = True  # the hash decides
                return part.length
            part.discard()
            raise TransientError("has no bytes beyond those received before; starting over")
        if response.status == PARTIAL_CONTENT:
            total = response.total
            is_same = part.origin.url != url or part.origin.is_same_file(response)
            if response.start != part.length or not is_same:
                part.discard()
                raise TransientError("the file has changed on the server; starting over")
            part.is_mixed = True
        else:
            if part.length:
                self.report(Note(f"{url}: sends the whole file again; starting over"))
            part.discard()
            total = response.length
        if self.size is not None and total is not None and total != self.size:
            raise PermanentError(f"offers {total} bytes, {self.size} are expected")
        need = max(0, (total or self.size or 0) - part.length)
        try:
            files.require_free(self.target.parent, need, purpose=f"fetching {self.target.name}")
        except RunError as error:
            if self.size is not None:
                raise
            raise PermanentError(str(error)) from error  # another server may declare another size
        if part.length == 0 or part.origin.url == url:
            part.origin = _Origin(url, response.etag, response.last_modified, total)
            files.write_json(part.origin_path, asdict(part.origin))
        return total

    def _append_body(self, response: Response, part: _PartialFile, total: int | None) -> None:
        length, expected = part.length, total or self.size
        folder, purpose = self.target.parent, f"fetching {self.target.name}"
        limit = expected or min(
            UNDECLARED_BYTES, length + max(0, files.free_bytes(folder) - files.SPARE_BYTES)
        )
        self._progress(length, expected)
        with (
            files.disk_full_errors(folder, purpose=purpose, need=lambda: (expected or 0) - part.length),
            part.path.open("ab", buffering=0) as file,
        ):
            while chunk := response.read(CHUNK_BYTES):
                self._received += len(chunk)
                length += len(chunk)
                if length > limit:
                    part.discard()
                    reason = "expected" if expected else "allowed for a file of unknown size"
                    raise PermanentError(f"sends more than the {limit} bytes {reason}")
                rest = memoryview(chunk)
                while rest:  # an unbuffered file may write less
                    rest = rest[file.write(rest) :]
                self._progress(length, expected)
            files.sync(file.fileno())
        if total is not None and length < total:
            raise TransientError(f"connection cut at {length} of {total} bytes")

    def _progress(self, done: int, total: int | None) -> None:
        self.report(Progress(f"fetch {self.target.name}", done, total, "bytes"))
