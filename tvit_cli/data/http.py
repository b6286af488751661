"""HTTP with verified TLS: requests, retries, and resumable downloads from mirrors.

Note [What makes a part usable]
A download goes on from `.<name>.part` only if the bytes to come belong to the bytes already there. The same
address proves it by its entity tag or date (If-Range: a changed file is sent whole). Another mirror, or an
address without either, can prove it afterwards only, by a known sha256; without one the file starts over. A
part that was put together so and turns out wrong is thrown away and fetched once more from this one address
before the address is blamed.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import json
import random
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from email.message import Message
from functools import cached_property
from pathlib import Path
from typing import IO, Final

from tvit_cli import __version__, files
from tvit_cli.errors import RunError

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


Progress = Callable[[int, int | None], None]  # bytes there, bytes in all where known
CHUNK_BYTES: Final = 256 * 1024


class MirrorsFailed(RunError):
    """No address served the file; `reasons` holds (address, why) in the order they were tried."""

    def __init__(self, what: str, reasons: Sequence[tuple[str, str]], *, advice: str) -> None:
        self.reasons = tuple(reasons)
        lines = "".join(f"\n  {url}: {reason}" for url, reason in reasons)
        super().__init__(f"{what} could not be had from any of {len(self.reasons)} sources:{lines}\n{advice}")


@dataclass(frozen=True)
class Fetched:
    """A whole file. `bytes_received` came over the wire now; `verified`: its hash was known before."""

    path: Path
    url: str
    bytes: int
    sha256: str
    verified: bool
    bytes_received: int = 0
    etag: str | None = None


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    http: Http | None = None,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
    free: files.FreeBytes = files.free_bytes,
) -> Fetched:
    """Bring a file to `target` from the first of `urls` that serves it with this size (bytes) and sha256.

    A target that is already there and right costs no request. Raises MirrorsFailed, and RunError where the
    disk is too small, fills up, or another process fetches the same file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.file_lock(
        target.with_name(f".{target.name}.lock"),
        f"{target}: another process is fetching it. Wait until it ends, then repeat this command.",
    ):
        work = _Fetch(target, size, sha256, http or Http(), progress or _quiet, report or _quiet, free)
        return work.already_there() or work.from_any(urls)


def file_sha256(path: Path, *, progress: Progress | None = None) -> str:
    """sha256 of a file, as 64 hexadecimal digits."""
    total = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1024 * 1024):
            digest.update(chunk)
            if progress:
                progress(file.tell(), total)
    return digest.hexdigest()


def is_fetched(target: Path, sha256: str | None = None) -> bool:
    """Whether a fetch has left this file, by the record beside it, and of this sha256 if one is given."""
    try:
        record = json.loads(_record(target).read_text(encoding="utf-8"))
        return bool(sha256 in (None, record["sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch_files(target: Path) -> list[str]:
    """Names of the files that a fetch leaves in a folder: the target, if it was fetched, and those beside it."""
    beside = [f".{target.name}.{end}" for end in ("part", "part.json", "lock", "source.json.new")]
    own = [target.name] if is_fetched(target) else []
    return [*own, *beside, _record(target).name]


def _record(target: Path) -> Path:
    return target.with_name(f".{target.name}.source.json")


def _quiet(*_: object) -> None:
    pass


@dataclass
class _Origin:
    """Where the bytes of a part came from; stored beside it."""

    url: str
    etag: str | None = None
    last_modified: str | None = None
    total: int | None = None

    @property
    def validator(self) -> str | None:
        """What If-Range may carry: a strong entity tag, else the date."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified


class _Part:
    """The bytes had so far, and their running hash."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.part")
        self.side = target.with_name(f".{target.name}.part.json")
        self.digest = hashlib.sha256()
        self.length = self.path.stat().st_size if self.path.exists() else 0
        self.origin: _Origin | None = None
        self.mixed = self.length > 0  # holds bytes that this run has not received from one address
        try:
            self.origin = _Origin(**json.loads(self.side.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.discard()  # nobody knows what these bytes are
        if self.length:
            with self.path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    self.digest.update(chunk)

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.side.unlink(missing_ok=True)
        self.digest, self.length, self.origin, self.mixed = hashlib.sha256(), 0, None, False

    def add(self, file: IO[bytes], chunk: bytes) -> None:
        """Append a chunk; where the disk is full in its middle, length and hash still tell the truth."""
        rest = memoryview(chunk)
        while rest:
            count = file.write(rest)  # a raw file may take less than it is given
            self.digest.update(rest[:count])
            self.length += count
            rest = rest[count:]


class _Stale(Exception):
    """What the server has now does not belong to the part; the part is gone."""


class _Fetch:
    def __init__(
        self,
        target: Path,
        size: int | None,
        sha256: str | None,
        http: Http,
        progress: Progress,
        report: Callable[[str], None],
        free: files.FreeBytes,
    ) -> None:
        self.target, self.size, self.sha256 = target, size, sha256
        self.http, self.progress, self.report, self.free = http, progress, report, free
        self.record = _record(target)
        self.received = 0

    def already_there(self) -> Fetched | None:
        """The target, if a finished fetch left it; one of another size or hash is removed.

        Raises RunError for a wrong file that no fetch has left.
        """
        if not self.target.is_file():
            return None
        found = file_sha256(self.target)
        size = self.target.stat().st_size
        if found != (self.sha256 or found) or size != (self.size or size):
            if not is_fetched(self.target, found):
                raise RunError(
                    f"{self.target}: {size} bytes, sha256 {found}, is not the file that is wanted, nor one "
                    "that tvit has fetched. Move it away and run the same command again."
                )
            self.report(f"{self.target}: {size} bytes, sha256 {found}, not what is wanted; fetched anew")
            self.target.unlink()
            return None
        try:
            url = str(json.loads(self.record.read_text(encoding="utf-8"))["url"])
        except (OSError, ValueError, KeyError, TypeError):
            url = self.target.name
        return Fetched(self.target, url, size, found, self.sha256 is not None)

    def from_any(self, urls: Sequence[str]) -> Fetched:
        part = _Part(self.target)
        reasons: list[tuple[str, str]] = []
        for url in urls:
            try:
                return self._from_one(url, part)
            except Refused as failure:
                reasons.append((url, str(failure)))
                self.report(f"{url}: {failure}")
        advice = "Try again later, or give a file that you already have with --archive."
        if part.length:
            advice += (
                f" {files.size_text(part.length)} are kept in {part.path} and will not be fetched again."
            )
        raise MirrorsFailed(self.target.name, reasons, advice=advice)

    def _from_one(self, url: str, part: _Part) -> Fetched:
        """Attempts at one address until the file is whole. Raises Refused."""
        most, attempt = part.length, 0
        while True:
            try:
                self._receive(url, part)
                if (wrong := self._wrong(part)) is None:
                    return self._finish(url, part)
                mixed = part.mixed
                part.discard()
                if not mixed:
                    raise Refused(wrong)  # See Note [What makes a part usable]
                failure = Broken(f"{wrong}, put together from several answers")
            except (Broken, _Stale) as error:
                failure = error if isinstance(error, Broken) else Broken(str(error))
            attempt = 1 if part.length > most else attempt + 1
            most = max(most, part.length)
            self.http.retry.wait(attempt, failure)

    def _receive(self, url: str, part: _Part) -> None:
        """One request, from where the part ends, written as it comes."""
        if not self._may_continue(url, part):
            part.discard()
        if part.length and part.length == (self.size or (part.origin and part.origin.total)):
            return
        headers = {}
        if part.length:
            headers["Range"] = f"bytes={part.length}-"
            if part.origin and part.origin.url == url and part.origin.validator:
                headers["If-Range"] = part.origin.validator
        with self.http.open(url, headers=headers) as answer:
            total = self._accept(url, answer, part)
            if total is None or total > part.length:
                self._write(answer, part, total)

    def _may_continue(self, url: str, part: _Part) -> bool:
        """See Note [What makes a part usable]."""
        if part.length == 0 or part.origin is None or (self.size and part.length > self.size):
            return False
        return self.sha256 is not None or (part.origin.url == url and part.origin.validator is not None)

    def _accept(self, url: str, answer: Response, part: _Part) -> int | None:
        """Bytes in all that the answer promises; the part is emptied where the answer starts at 0."""
        if answer.status == RANGE_NOT_SATISFIABLE:
            if part.length and answer.total == part.length:
                return part.length
            part.discard()
            raise _Stale("has fewer bytes than were received before; starting over")
        if answer.status == PARTIAL:
            total = answer.total
            if answer.start != part.length or not self._is_as_before(url, answer, part.origin):
                part.discard()
                raise _Stale("the file has changed on the server; starting over")
            part.mixed = True
        elif answer.status == OK:
            if part.length:
                self.report(f"{url}: sends the whole file again; starting over")
            part.discard()
            total = answer.length
        else:
            raise Refused(f"HTTP {answer.status} with nothing in it")
        if self.size is not None and total is not None and total != self.size:
            raise Refused(f"offers {total} bytes, {self.size} are expected")
        need = (total or self.size or 0) - part.length
        files.require_free(self.target.parent, need, purpose=f"fetching {self.target.name}", free=self.free)
        if part.length == 0 or (part.origin and part.origin.url == url):
            part.origin = _Origin(url, answer.etag, answer.last_modified, total)
            files.write_json(part.side, asdict(part.origin))
        return total

    def _is_as_before(self, url: str, answer: Response, origin: _Origin | None) -> bool:
        """Whether nothing that a server tells of the rest says that it is of another file than the beginning."""
        if origin is None or origin.url != url:
            return True
        dates, sizes = {origin.last_modified, answer.last_modified}, {origin.total, answer.total}
        return origin.etag in (None, answer.etag) and len(dates - {None}) < 2 and len(sizes - {None}) < 2

    def _write(self, answer: Response, part: _Part, total: int | None) -> None:
        limit = total or self.size

        def still_needed() -> int:
            return (limit or 0) - part.length

        self.progress(part.length, limit)
        with (
            files.disk_full_errors(
                self.target.parent, purpose=f"fetching {self.target.name}", need=still_needed
            ),
            part.path.open("ab", buffering=0) as file,
        ):
            while chunk := answer.read(CHUNK_BYTES):
                self.received += len(chunk)
                if limit is not None and part.length + len(chunk) > limit:
                    part.discard()
                    raise Refused(f"sends more than the {limit} bytes expected")
                part.add(file, chunk)
                self.progress(part.length, limit)
            files.sync(file.fileno())
        if total is not None and part.length < total:
            raise Broken(f"connection cut at {part.length} of {total} bytes")

    def _wrong(self, part: _Part) -> str | None:
        if self.size is not None and part.length != self.size:
            return f"sent {part.length} bytes, {self.size} are expected"
        found = part.digest.hexdigest()
        if self.sha256 is not None and found != self.sha256:
            return f"sent a file of sha256 {found}, {self.sha256} is expected"
        return None

    def _finish(self, url: str, part: _Part) -> Fetched:
        done = Fetched(
            path=self.target,
            url=url,
            bytes=part.length,
            sha256=part.digest.hexdigest(),
            verified=self.sha256 is not None,
            bytes_received=self.received,
            etag=part.origin.etag if part.origin else None,
        )
        part.path.touch()  # an empty file has had no chunk
        files.write_json(self.record, {"url": url, "sha256": done.sha256})
        files.rename(part.path, self.target)
        part.side.unlink(missing_ok=True)
        return done
