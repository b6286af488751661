"""Download of one file, and archives: complete, resumed, safe, clean after a kill."""

import functools
import hashlib
import io
import os
import random
import signal
import ssl
import subprocess
import sys
import time
import zipfile
from pathlib import Path, PurePosixPath

import loopback
import pytest
from archives import WRITERS, Entry, deflated_zeros, write_rar4, write_tar, write_zip
from loopback import Page

from tvit_cli import files
from tvit_cli.data import rar
from tvit_cli.data.archive_safety import Limits, Member, check_members
from tvit_cli.data.archives import detect_kind, store, unpack
from tvit_cli.data.http import Download, Http, MirrorsFailed, PermanentError, Retry, TransientError
from tvit_cli.data.transfer import RangeFile, RemoteZip
from tvit_cli.errors import DataError, RunError
from tvit_cli.results import Note, Progress

BODY = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
FETCH = """
from pathlib import Path
from tvit_cli.data.http import Download
Download(Path({target!r})).fetch([{url!r}])
"""


@pytest.fixture
def server():
    with loopback.serving() as running:
        yield running


def quick(waits=None, **how):
    """An Http that does not sleep, but tells how long it would have."""
    sleep = waits.append if waits is not None else lambda _: None
    return Http(timeout=5, retry=Retry(sleep=sleep, jitter=lambda: 0.5, **how))  # type: ignore[arg-type]


def get(urls, target, **how):
    how.setdefault("http", quick())
    return Download(target, **how).fetch(urls)  # type: ignore[arg-type]


def names(folder):
    """Files of a folder, without the lock and the record of the source."""
    return {path.name for path in folder.iterdir() if not path.name.endswith((".lock", ".source.json"))}


def test_file_comes_whole_with_its_hash(server, tmp_path):
    events = []
    done = get([server.add("/a", BODY)], tmp_path / "a", size=len(BODY), sha256=SHA256, report=events.append)
    assert (tmp_path / "a").read_bytes() == BODY
    assert (done.sha256, done.bytes_received, done.verified) == (SHA256, len(BODY), True)
    assert events[0] == Progress("fetch a", 0, len(BODY), "bytes")
    assert events[-1] == Progress("fetch a", len(BODY), len(BODY), "bytes")
    assert names(tmp_path) == {"a"}
    empty = get([server.add("/empty", b"")], tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b"" and (empty.bytes, empty.bytes_received) == (0, 0)
    unknown = get([server.add("/b", BODY, no_length=True)], tmp_path / "b")
    assert (unknown.sha256, unknown.verified) == (SHA256, False)


def test_file_that_is_there_costs_no_request(server, tmp_path):
    url = server.add("/a", BODY)
    get([url], tmp_path / "a", sha256=SHA256)
    server.forget()
    done = get([url], tmp_path / "a", sha256=SHA256)
    assert server.requests == [] and done.bytes_received == 0 and done.url == url


CUT = {"cut_after": 90_000, "cuts": 1}


def test_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    done = get([server.add("/a", BODY, **CUT)], tmp_path / "a", sha256=SHA256)
    assert server.sent == done.bytes_received == len(BODY)  # not a byte twice
    assert server.requests[1][1]["Range"] == "bytes=90000-" and "If-Range" in server.requests[1][1]
    always = server.add("/always", BODY, cut_after=20_000)
    got = get([always], tmp_path / "always", sha256=SHA256, http=quick(attempts=2))
    assert got.bytes_received == len(BODY)


@pytest.mark.parametrize(
    "facts", [{"ranges": False}, {"etag": None}, {"wrong_range": True}], ids=lambda facts: next(iter(facts))
)
def test_part_that_cannot_be_resumed_starts_over(server, tmp_path, facts):
    assert get([server.add("/a", BODY, **CUT, **facts)], tmp_path / "a").sha256 == SHA256
    assert server.sent == len(BODY) + 90_000 or "wrong_range" in facts


def test_server_without_range_is_given_up_in_the_end(server, tmp_path):
    always = server.add("/always", BODY, ranges=False, cut_after=90_000)
    with pytest.raises(MirrorsFailed, match=r"cut at 90000 of 300000 bytes \(3 attempts\)"):
        get([always], tmp_path / "always", http=quick(attempts=3))


def begun(server, tmp_path, body=BODY, **facts):
    """A file of which an earlier run has fetched the first part."""
    url = server.add("/a", body, **CUT, **facts)
    with pytest.raises(MirrorsFailed, match="are kept"):
        get([url], tmp_path / "a", http=quick(attempts=1))
    server.forget()
    return url


def test_part_of_an_earlier_run_is_resumed(server, tmp_path):
    assert get([begun(server, tmp_path)], tmp_path / "a").sha256 == SHA256
    assert server.sent == len(BODY) - 90_000


def dated(day, **facts):
    return {"etag": None, "last_modified": f"{day} Jan 2024 00:00:00 GMT", **facts}


BLIND = {"ignore_if_range": True}
CHANGED = {  # before; bytes and facts of the file that is there afterwards
    "another tag": ({}, 300_000, {}),
    "another tag, conditions ignored": ({}, 300_000, BLIND),
    "shrunk": (dated("Mon, 01"), 1000, dated("Mon, 01")),
    "another day, conditions ignored": (dated("Mon, 01", **BLIND), 300_000, dated("Tue, 02", **BLIND)),
    "another length, conditions ignored": (dated("Mon, 01", **BLIND), 299_000, dated("Mon, 01", **BLIND)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_file_that_changed_meanwhile_starts_over(server, tmp_path, case):
    before, size, after = CHANGED[case]
    url = begun(server, tmp_path, BODY if case == "shrunk" else bytes(len(BODY)), **before)
    server.add("/a", BODY[:size], **after)
    assert get([url], tmp_path / "a").bytes == size
    assert (tmp_path / "a").read_bytes() == BODY[:size]


def test_next_mirror_goes_on_with_the_part_where_the_hash_is_known(server, tmp_path):
    first = server.add("/first", BODY, cut_after=90_000)
    second = server.add("/second", BODY)
    done = get([first, second], tmp_path / "a", sha256=SHA256, http=quick(attempts=1))
    assert done.url == second and server.sent == len(BODY)


def test_mixed_part_that_turns_out_wrong_is_fetched_once_more(server, tmp_path):
    first = server.add("/first", bytes(len(BODY)), cut_after=90_000, ranges=False)
    second = server.add("/second", BODY)
    done = get([first, second], tmp_path / "a", sha256=SHA256, http=quick(attempts=2))
    assert (tmp_path / "a").read_bytes() == BODY and done.url == second


def test_wrong_hash_keeps_nothing_and_goes_to_the_next_mirror(server, tmp_path):
    wrong = server.add("/wrong", bytes(len(BODY)))
    with pytest.raises(MirrorsFailed, match=f"{SHA256} is expected"):
        get([wrong], tmp_path / "a", sha256=SHA256)
    assert names(tmp_path) == set()
    assert get([wrong, server.add("/right", BODY)], tmp_path / "a", sha256=SHA256).url.endswith("/right")


def test_wrong_size_is_refused_before_a_byte_is_read(server, tmp_path):
    with pytest.raises(MirrorsFailed, match="offers 300000 bytes, 299999 are expected"):
        get([server.add("/a", BODY)], tmp_path / "a", size=len(BODY) - 1)
    endless = server.add("/endless", BODY, no_length=True)
    with pytest.raises(MirrorsFailed, match="more than the 1000 bytes expected"):
        get([endless], tmp_path / "b", size=1000)
    assert names(tmp_path) == set()


def test_every_mirror_that_failed_is_listed_with_its_reason(server, tmp_path):
    gone = f"{server.base}/gone"
    busy = server.add("/busy", BODY, statuses=[(503, {})] * 9)
    with pytest.raises(MirrorsFailed) as caught:
        get([gone, busy, "ftp://localhost/a"], tmp_path / "a", http=quick(attempts=3))
    assert [url for url, _ in caught.value.reasons] == [gone, busy, "ftp://localhost/a"]
    assert "404" in str(caught.value) and "503" in str(caught.value) and "(3 attempts)" in str(caught.value)
    assert [path for path, _ in server.requests] == ["/gone", "/busy", "/busy", "/busy"]
    assert caught.value.exit_code == 1


def test_retry_after_is_honoured_up_to_a_bound(server, tmp_path):
    waits = []
    url = server.add("/a", BODY, statuses=[(503, {"Retry-After": "7"}), (503, {})])
    get([url], tmp_path / "a", http=quick(waits))
    assert waits == [7, 2.0]
    far = server.add("/far", BODY, statuses=[(503, {"Retry-After": "7200"})])
    with pytest.raises(MirrorsFailed, match="asks to wait 7200 s"):
        get([far], tmp_path / "far")


@pytest.mark.parametrize(
    "head",
    [
        "302 Found\r\nLocation: http://[::1",
        "302 Found\r\nLocation: http://localhost:99999999/a",
        "503 Busy\r\nRetry-After: " + "9" * 5000,
        "200 OK\r\nContent-Length: " + "9" * 9999,
        "200 OK\r\nContent-Length: " + "9" * 18,
    ],
    ids=["location", "port", "retry-after", "length of 9,999 digits", "length of 18 digits"],
)
def test_malformed_header_leads_to_the_next_mirror(server, tmp_path, head):
    bad = server.add("/bad", b"", raw=[f"HTTP/1.1 {head}\r\n\r\n".encode()])
    good = server.add("/good", BODY)
    done = get([bad, good], tmp_path / "a")
    assert (done.url, done.sha256) == (good, SHA256)


@pytest.mark.parametrize(
    ("start", "repeated"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"Trailer: x\r\n"),
    ],
)
def test_flood_of_headers_ends_the_attempt(server, tmp_path, start, repeated):
    url = server.add("/a", b"", raw=[start, repeated * 50_000, b"\r\n"])
    with pytest.raises(MirrorsFailed, match="more than"):
        get([url], tmp_path / "a", http=quick(attempts=1))


def test_server_of_a_few_bytes_a_second_is_too_slow(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tvit_cli.data.http.PATIENCE", 0.5)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n"
    slow = {"seconds_per_chunk": 0.03}
    body = server.add("/body", b"", raw=[head, *[b"x"] * 60], **slow)
    headers = server.add("/headers", b"", raw=[bytes([byte]) for byte in head] + [b"x" * 60], **slow)
    with pytest.raises(MirrorsFailed) as caught:
        get([body, headers], tmp_path / "a", http=quick(attempts=1))
    reasons = [reason for _, reason in caught.value.reasons]
    assert "too slow" in reasons[0] and "headers or trailers not complete" in reasons[1]


def test_server_of_one_byte_per_connection_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tvit_cli.data.http.LEAST_RATE", 10**9)
    url = server.add("/a", BODY, cut_after=1)
    with pytest.raises(MirrorsFailed, match=r"\(3 attempts\)"):
        get([url], tmp_path / "a", http=quick(attempts=3))
    assert len(server.requests) == 3


def test_file_of_unknown_size_is_not_read_until_the_disk_is_full(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tvit_cli.data.http.UNDECLARED_BYTES", 100_000)
    url = server.add("/a", BODY, no_length=True)
    with pytest.raises(MirrorsFailed, match="sends more than the 100000 bytes allowed"):
        get([url], tmp_path / "a", sha256=SHA256)
    assert names(tmp_path) == set()


def test_cut_file_is_not_whole_after_a_416_of_its_length(server, tmp_path):
    url = begun(server, tmp_path)
    server.pages["/a"].statuses = [(416, {"Content-Range": "bytes */90000"})]
    assert get([url], tmp_path / "a").sha256 == SHA256


def test_retries_are_shown_and_back_off_doubles_up_to_its_bound(server, tmp_path):
    events = []
    url = server.add("/a", BODY, statuses=[(503, {})])
    get([url], tmp_path / "a", report=events.append)
    assert events[0] == Note(f"{url}: HTTP 503 Service Unavailable; attempt 2 of 6 in 1 s")
    waits = []
    retry = Retry(attempts=9, first_seconds=1, most_seconds=5, sleep=waits.append, jitter=lambda: 0.0)
    for attempt in range(1, 5):
        retry.wait(attempt, TransientError("x"))
    assert waits == [0.75, 1.5, 3.0, 3.75]


def test_redirect_is_followed_with_its_range(server, tmp_path):
    server.add("/real", BODY, cut_after=90_000, cuts=1)
    url = server.add("/a", b"", redirect="/real")
    assert get([url], tmp_path / "a").sha256 == SHA256
    assert server.sent == len(BODY)
    loop = server.add("/loop", b"", redirect="/loop")
    with pytest.raises(MirrorsFailed, match="HTTP 302"):
        get([loop], tmp_path / "b")


def test_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.base.replace("http://", "http://user:p%40ss@"))
    server.pages["http://mirror.test/a"] = Page(BODY, cut_after=90_000, cuts=1)
    assert get(["http://mirror.test/a"], tmp_path / "a").sha256 == SHA256
    sent = {name.lower(): value for name, value in server.requests[0][1].items()}
    assert sent["proxy-authorization"] == "Basic dXNlcjpwQHNz"
    monkeypatch.setenv("no_proxy", "localhost")
    assert get([server.add("/b", BODY)], tmp_path / "b").sha256 == SHA256


def test_slow_server_is_waited_for_and_a_silent_one_is_not(server, tmp_path):
    slow = server.add("/slow", BODY, seconds_per_chunk=0.05)
    assert get([slow], tmp_path / "slow").sha256 == SHA256
    silent = server.add("/silent", BODY, seconds_per_chunk=0.8, chunk=1000)
    http = Http(timeout=0.2, retry=Retry(attempts=1, sleep=lambda _: None))
    with pytest.raises(MirrorsFailed, match="timed out"):
        get([silent], tmp_path / "silent", http=http, sha256="0" * 64)


def test_missing_servers_are_named_and_blind_contexts_never_used(tmp_path):
    with pytest.raises(MirrorsFailed, match=r"no connection .*\(2 attempts\)"):
        get(["http://localhost:9/a"], tmp_path / "a", http=quick(attempts=2))
    blind = ssl.create_default_context()
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    with pytest.raises(ValueError, match="never used"):
        Http(trust=blind).open("https://localhost/")


def test_certificate_that_does_not_verify_is_refused_at_once(tmp_path):
    pair = loopback.self_signed(tmp_path)
    with loopback.serving(certificate=pair) as server:
        url = server.add("/a", BODY)
        with pytest.raises(MirrorsFailed, match="TLS certificate does not verify"):
            get([url], tmp_path / "a")
        assert server.requests == []  # not asked again without the check
        trust = ssl.create_default_context(cafile=str(pair[0]))
        assert get([url], tmp_path / "a", http=Http(trust=trust)).sha256 == SHA256
        server.add("/down", b"", redirect="http://localhost:9/a")
        with pytest.raises(MirrorsFailed, match="redirects from https to http"):
            get([f"{server.base}/down"], tmp_path / "b", http=Http(trust=trust))


def test_full_disk_is_seen_before_and_names_what_is_needed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda _: 100)
    url = server.add("/a", BODY)
    with pytest.raises(RunError, match=r"needs 300 kB, 100 bytes are free.*--data-directory"):
        get([url], tmp_path / "a")
    assert names(tmp_path) == set()


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from tvit_cli.data.archives import unpack
from tvit_cli.data.http import Download
from tvit_cli.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    {work}
except RunError as error:
    sys.exit(str(error))
"""


def on_a_small_disk(work):
    """The error of some code in a process whose files can have 100 kB."""
    code = SMALL_DISK.format(work=work)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr


def test_disk_that_fills_up_keeps_the_part_for_later(server, tmp_path):
    url = server.add("/a", BODY)
    said = on_a_small_disk(f"Download(Path({str(tmp_path / 'a')!r})).fetch([{url!r}])")
    assert "disk full while" in said and "200 kB more are needed" in said
    server.forget()
    assert get([url], tmp_path / "a", sha256=SHA256).bytes_received <= 200_000 + 64 * 1024


def test_two_fetches_of_one_file_do_not_mix(server, tmp_path):
    url = server.add("/a", BODY, seconds_per_chunk=0.5)
    code = FETCH.format(url=url, target=str(tmp_path / "a"))
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        while not server.sent:
            time.sleep(0.01)
        with pytest.raises(RunError, match="another process is fetching it"):
            get([url], tmp_path / "a")
        child.kill()


def test_killed_at_any_byte_it_goes_on(server, tmp_path):
    body = random.Random(2).randbytes(2_000_000)
    url = server.add("/a", body, seconds_per_chunk=0.05)
    code = FETCH.format(url=url, target=str(tmp_path / "a"))
    for point in (1, 200_000, 400_000):
        server.forget()
        with subprocess.Popen([sys.executable, "-c", code]) as child:
            while server.sent < point:
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
        assert not (tmp_path / "a").exists()
    server.forget()
    server.pages["/a"].seconds_per_chunk = 0
    done = get([url], tmp_path / "a")
    assert done.sha256 == hashlib.sha256(body).hexdigest()
    assert server.sent < len(body)


def make_zip(path, count=40, *, size=20_000):
    source = random.Random(3)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(count):
            archive.writestr(f"set/{index:03}.bin", source.randbytes(size))
    return path.read_bytes()


def test_chosen_members_cost_little_more_than_their_bytes(server, tmp_path):
    body = make_zip(tmp_path / "a.zip")
    remote = RemoteZip(server.add("/a.zip", body), http=quick(), most_directory=10**6)
    chosen = [remote.infos[index] for index in (3, 4, 5, 20, 39)]
    read = {info.filename: stream.read() for info, stream in remote.read(chosen)}
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert read == {info.filename: archive.read(info.filename) for info in chosen}
    packed = sum(info.compress_size for info in chosen)
    assert server.sent == remote.file.received <= 1.05 * packed + 33_000
    assert len(server.requests) == 4  # tail; 3 to 5 in one; 20; 39 is apart from the tail that is there


def test_members_near_each_other_share_a_request_also_in_zip64(server, tmp_path, monkeypatch):
    body = make_zip(tmp_path / "a.zip", size=5_000)
    remote = RemoteZip(server.add("/a.zip", body), http=quick(), most_directory=10**6)
    assert [len(stream.read()) for _, stream in remote.read([remote.infos[3], remote.infos[5]])] == [
        5_000
    ] * 2
    assert len(server.requests) == 2
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    body = make_zip(tmp_path / "a.zip", 5, size=100)
    assert b"PK\x06\x06" in body
    remote = RemoteZip(server.add("/a.zip", body), http=quick(), most_directory=10**6)
    assert [len(stream.read()) for _, stream in remote.read(remote.infos)] == [100] * 5


def test_cut_range_goes_on_and_a_changed_archive_is_refused(server, tmp_path):
    body = make_zip(tmp_path / "a.zip")
    url = server.add("/a.zip", body)
    remote = RemoteZip(url, http=quick(), most_directory=10**6)
    server.pages["/a.zip"].cut_after, server.pages["/a.zip"].cuts = 5_000, 3
    assert [len(stream.read()) for _, stream in remote.read(remote.infos[:2])] == [20_000, 20_000]
    server.add("/a.zip", body[:-1] + b"x")
    with pytest.raises(PermanentError, match="changed on the server"):
        next(remote.read(remote.infos[30:31]))[1].read()


def test_server_that_ignores_range_is_told_apart_without_reading_it(server, tmp_path):
    url = server.add("/a.zip", make_zip(tmp_path / "a.zip", 200), ranges=False, seconds_per_chunk=0.05)
    with pytest.raises(PermanentError, match="ignores Range"):
        RemoteZip(url, http=quick(), most_directory=10**6)
    assert server.sent < 2_000_000


def test_large_directories_long_ranges_and_no_zip_are_refused(server, tmp_path):
    with pytest.raises(PermanentError, match="directory cannot be read"):
        RemoteZip(server.add("/page", b"<html>" * 100), http=quick(), most_directory=10**6)
    file = RangeFile(server.add("/b", BODY), quick(), most_read=1000)
    with pytest.raises(PermanentError, match="at once, limit 1000"):
        file.read(2000)
    head = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/1000000\r\nContent-Length: 1000000\r\n\r\n"
    file = RangeFile(server.add("/a", b"", raw=[head, bytes(1_000_000)]), quick())
    assert file.received == 32 * 1024


HAS_RAR = bool(rar.find_reader())
FORMS = [
    form
    if not form.startswith("rar")
    else pytest.param(form, marks=pytest.mark.skipif(not HAS_RAR, reason="no RAR"))
    for form in WRITERS
]
LINK, DEVICE, FOLDER = 0o120777, 0o020644, 0o040755
# name -> (members, what the error says)
HOSTILE: dict[str, tuple[list[Entry], str]] = {
    "up and out": ([Entry("a/../../x")], "leads out"),
    "straight out": ([Entry("../etc/x")], "leads out"),
    "absolute": ([Entry("/etc/tvit-was-here")], "absolute"),
    "drive letter": ([Entry("C:/x")], "':'"),
    "newline": ([Entry("a\nb")], "control character"),
    "escape code": ([Entry("a\x1b[31m")], "control character"),
    "same name twice": ([Entry("a/x"), Entry("a/x")], "collides"),
    "names that differ by case": ([Entry("a/x"), Entry("a/X")], "collides"),
    "folders that differ by case": ([Entry("a/x"), Entry("A/y")], "collides"),
    "names that differ by Unicode form": ([Entry("caf\u00e9"), Entry("cafe\u0301")], "collides"),
    "a file that is a folder": ([Entry("a"), Entry("a/x")], "collides"),
    "Windows device": ([Entry("a/NUL.avi")], "device"),
    "trailing dot": ([Entry("a./x")], "dot or a space"),
    "link": ([Entry("a", b"/etc", LINK)], "is a link"),
    "link and a file through it": ([Entry("a", b"/tmp", LINK), Entry("a/x")], "is a link"),
    "hard link": ([Entry("x"), Entry("y", b"/etc/passwd", hard_link=True)], "is a link"),
    "too large a member": ([Entry("a", b"x" * 2000)], "limit 1 kB"),
    "too many members": ([Entry(f"m{index}") for index in range(60)], "more than 50 members"),
    "too much in all": ([Entry(f"m{index}", b"x" * 900) for index in range(20)], "unpacked, limit"),
}
LIMITS = Limits(members=50, member_bytes=1000, total_bytes=10_000, ratio=100)


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_writes_nothing(form, name, tmp_path):
    entries, reason = HOSTILE[name]
    if name == "hard link" and form in ("zip", "rar4"):
        pytest.skip("this format has no hard links")
    WRITERS[form](tmp_path / "a", entries)
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=reason):
        unpack(tmp_path / "a", tmp_path / "in" / "target", limits=LIMITS)
    assert everything(tmp_path) == {"a", "in"}
    assert not Path("/etc/tvit-was-here").exists()


@pytest.mark.parametrize("form", FORMS)
def test_good_archive_of_every_form_comes_out_whole(form, tmp_path):
    entries = [
        Entry("a", b"", FOLDER), Entry("a/x.avi", b"one"), Entry("a/y ü.avi", b""), Entry("z.txt", b"three"),
    ]  # fmt: skip
    if form == "zip":
        entries[0] = Entry("a/", b"", FOLDER)
    WRITERS[form](tmp_path / "archive", entries)
    files = unpack(tmp_path / "archive", tmp_path / "out")
    found = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*.*")
    }
    assert found == {"a/x.avi": b"one", "a/y ü.avi": b"", "z.txt": b"three"}
    assert {str(file.path): file.sha256 for file in files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in found.items()
    }
    assert everything(tmp_path) == {"archive", "out", "out/a", *(f"out/{name}" for name in found)}


def patched(write, path, change):
    """Writes an archive, then changes its bytes."""
    write(path)
    path.write_bytes(change(path.read_bytes()))


REPARSE_POINT = 0x400
RAR = pytest.mark.skipif(not HAS_RAR, reason="no RAR")
ZIP_CRC = functools.partial(write_zip, entries=[Entry("a", b"good")])
TAR_OF_2 = functools.partial(write_tar, entries=[Entry("x", bytes(512)), Entry("y", bytes(512))])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: deflated_zeros(path, "zeros", 8 * 2**20), "limit 100 times"),
        (lambda path: write_tar(path, [Entry("x\udce4.avi")]), "control character"),
        (lambda path: write_zip(path, [Entry("x.avi\0.exe")]), "in its name"),
        (lambda path: write_zip(path, [Entry("a\\..\\x")]), "in its name"),
        (lambda path: write_zip(path, [Entry("")]), "has no name"),
        (lambda path: write_tar(path, [Entry(".")]), "has no name"),
        (
            lambda path: patched(ZIP_CRC, path, lambda data: data[:-6] + b"\xff\xff\xff\0" + data[-2:]),
            "is damaged .*outside of the file",
        ),
        (lambda path: write_zip(path, [Entry("null", b"", DEVICE)]), "neither a file nor a folder"),
        (lambda path: write_tar(path, [Entry("null", b"", DEVICE)]), "neither a file nor a folder"),
        (lambda path: patched(TAR_OF_2, path, lambda data: data[:1024]), "no end mark"),
        (lambda path: patched(ZIP_CRC, path, lambda data: data.replace(b"good", b"evil")), "CRC"),
        (
            lambda path: path.write_text("<!DOCTYPE html><title>Sign in</title>" * 20),
            r"no ZIP, tar or RAR archive.*sent a page",
        ),
        pytest.param(
            lambda path: write_rar4(path, [Entry("a", mode=REPARSE_POINT)], host=2), "is a link", marks=RAR
        ),
        pytest.param(lambda path: write_rar4(path, [Entry("a")], locked=True), "encrypted", marks=RAR),
    ],
)
def test_unsafe_or_damaged_archive_is_refused_with_the_reason(write, reason, tmp_path):
    write(tmp_path / "a")
    with pytest.raises(DataError, match=reason):
        unpack(tmp_path / "a", tmp_path / "out")
    assert everything(tmp_path) == {"a"}


@pytest.mark.parametrize("form", FORMS)
def test_plan_chooses_and_renames(form, tmp_path):
    WRITERS[form](tmp_path / "archive", [Entry(f"a/{index}.avi", b"%d" % index) for index in range(5)])

    def plan(members):
        return {3: PurePosixPath("new/three"), 1: PurePosixPath("one")}

    assert [file.member for file in unpack(tmp_path / "archive", tmp_path / "out", plan=plan)] == [
        "a/1.avi",
        "a/3.avi",
    ]
    assert (tmp_path / "out/new/three").read_bytes() == b"3"
    assert everything(tmp_path / "out") == {"new", "new/three", "one"}


@pytest.mark.skipif(not HAS_RAR, reason="no RAR")
def test_nul_in_a_rar_name_leads_nowhere(tmp_path):
    write_rar4(tmp_path / "a.rar", [Entry("x\0/../../y")])
    try:
        unpack(tmp_path / "a.rar", tmp_path / "out")
    except DataError:
        assert everything(tmp_path) == {"a.rar"}
    else:  # 7-Zip ends a name at its NUL
        assert everything(tmp_path) == {"a.rar", "out", "out/x"}


def test_declared_ten_gigabytes_are_refused_unread(tmp_path):
    for form in ("zip", "tar"):
        size = 10 * 2**30 if form == "tar" else 2**32 - 2
        WRITERS[form](tmp_path / "a", [Entry("zeros", b"0", declared=size)])
        began = time.monotonic()
        with pytest.raises(DataError, match="limit"):
            unpack(tmp_path / "a", tmp_path / "out")
        assert time.monotonic() - began < 1
    assert everything(tmp_path) == {"a"}


def test_million_entries_are_refused_before_they_are_listed(tmp_path):
    count = 1_000_000
    entry = b"PK\x01\x02" + bytes(42) + b"x"
    end = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes(12)
    end += b"".join(value.to_bytes(8, "little") for value in (count, count, len(entry) * count, 4))
    end += b"PK\x06\x07" + bytes(4) + (4 + len(entry) * count).to_bytes(8, "little") + b"\1\0\0\0"
    end += b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04" + entry * count + end)
    began = time.monotonic()
    with pytest.raises(DataError, match="its directory or a header has 47 MB, limit 20 MB"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert time.monotonic() - began < 2


def test_members_that_lie_about_their_size_or_overlap_are_caught(tmp_path):
    write_zip(tmp_path / "a.zip", [Entry("a", b"x" * 100, declared=10)])  # its CRC is that of 100 bytes
    with pytest.raises(DataError):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    write_tar(tmp_path / "a.tar", [Entry("a", b"x" * 100, declared=50_000)])
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert everything(tmp_path) == {"a.zip", "a.tar"}
    members = [Member(index, f"m{index}", 900, packed=900) for index in range(10)]
    with pytest.raises(DataError, match="overlap"):
        check_members(members, archive="a", packed_bytes=1000)


@pytest.mark.parametrize("form", ["zip", *FORMS[2:3]])
def test_encrypted_member_is_named(form, tmp_path):
    WRITERS[form](tmp_path / "a", [Entry("secret.avi", bytes(16), encrypted=True)])
    with pytest.raises(DataError, match=r"secret\.avi' is encrypted"):
        unpack(tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("data", [b"x" * 9, b"x" * 11, b"x" * 999])
def test_stream_of_another_size_than_declared_is_caught(data, tmp_path):
    with pytest.raises(DataError, match="than the 10 bytes it declares"):
        store(io.BytesIO(data), tmp_path / "a", Member(0, "a", 10), archive="a.zip")
    assert (tmp_path / "a").stat().st_size <= 10


@pytest.mark.parametrize("form", FORMS)
def test_truncated_archive_is_damaged(form, tmp_path):
    WRITERS[form](tmp_path / "whole", [Entry(f"{index}", os.urandom(3000)) for index in range(4)])
    whole = (tmp_path / "whole").read_bytes()
    for share in (0.2, 0.4, 0.6):
        (tmp_path / "a").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError):
            unpack(tmp_path / "a", tmp_path / "out")
    assert everything(tmp_path) == {"whole", "a"}


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_compressed_tar_is_known_by_its_bytes(suffix, tmp_path):
    import bz2
    import gzip
    import lzma

    write_tar(tmp_path / "plain.tar.gz", [Entry("a/x", b"one")])  # as ucf101-subset: no gzip in it
    unpack(tmp_path / "plain.tar.gz", tmp_path / "plain")
    assert (tmp_path / "plain" / "a" / "x").read_bytes() == b"one"
    packed = {"gz": gzip, "bz2": bz2, "xz": lzma}[suffix].compress((tmp_path / "plain.tar.gz").read_bytes())
    (tmp_path / "a.zip").write_bytes(packed)
    assert detect_kind(tmp_path / "a.zip") == "tar"
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert (tmp_path / "out/a/x").read_bytes() == b"one"


def test_disk_too_small_is_seen_before_a_byte_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda _: 4999)
    write_zip(tmp_path / "a.zip", [Entry("a", bytes(5000))])
    with pytest.raises(RunError, match=r"unpacking a.zip needs 5 kB"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert everything(tmp_path) == {"a.zip"}


def test_disk_that_fills_up_while_unpacking_leaves_nothing(tmp_path):
    write_zip(
        tmp_path / "a.zip",
        [Entry(f"{index}", bytes(60_000)) for index in range(3)] + [Entry("b", bytes(200_000))],
    )
    places = [f"Path({str(tmp_path / name)!r})" for name in ("a.zip", "out")]
    said = on_a_small_disk(f"unpack({', '.join(places)})")
    assert "disk full while unpacking a.zip" in said and "200 kB more" in said
    assert everything(tmp_path) == {"a.zip"}


@pytest.mark.parametrize("form", FORMS[:3])
def test_killed_at_any_moment_it_leaves_nothing_or_all(form, tmp_path):
    entries = [Entry(f"{index:03}", os.urandom(4000)) for index in range(150)]
    WRITERS[form](tmp_path / "a", entries)
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from tvit_cli.data.archives import unpack
print("go", flush=True)
unpack(Path({str(tmp_path / "a")!r}), Path({str(out)!r}))
"""
    for pause in (0.0, 0.01, 0.03, 0.08):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"go\n"
            time.sleep(pause)
            child.send_signal(signal.SIGKILL)
        if out.exists():
            assert len(everything(out)) == 150
            out.rename(tmp_path / f"whole{pause}")
        left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("whole")}
        assert left <= {"a", ".out.unpacking"}
    unpack(tmp_path / "a", out)
    assert {entry.name: entry.data for entry in entries} == {
        path.name: path.read_bytes() for path in out.iterdir()
    }
    assert not (tmp_path / ".out.unpacking").exists()


def test_target_that_is_there_is_left_alone(tmp_path):
    write_zip(tmp_path / "a.zip", [Entry("a")])
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="already exists"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_without_a_reader_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(rar, "find_reader", lambda: None)
    write_rar4(tmp_path / "a.rar", [Entry("a")])
    with pytest.raises(DataError, match=r'python -m pip install "tvit\[rar\]"'):
        unpack(tmp_path / "a.rar", tmp_path / "out")


FAKE_7ZZ = """#!{python}
import os, sys
verb, folder = sys.argv[1], next((a[2:] for a in sys.argv if a.startswith("-o")), "")
if verb == "i":
    print("{codec}")
elif verb == "l":
    print("Path = a\\nSize = 4\\nAttributes = A -rw-r--r--")
elif {linked}:
    os.symlink("/etc/passwd", os.path.join(folder, "a"))
else:
    open(os.path.join(folder, "a"), "w").write("{content}")
"""


def seven_zip(folder, *, codec="  D     40305 Rar5", linked=False, content="data"):
    """A program named 7zz that lists and extracts one member."""
    text = FAKE_7ZZ.format(python=sys.executable, codec=codec, linked=linked, content=content)
    (folder / "7zz").write_text(text)
    (folder / "7zz").chmod(0o755)


def test_seven_zip_is_used_if_it_decodes_rar(tmp_path, monkeypatch):
    monkeypatch.setattr(rar, "find_reader", rar.find_program)
    monkeypatch.setenv("PATH", str(tmp_path))
    write_rar4(tmp_path / "a.rar", [Entry("a")])
    (tmp_path / "7z").write_text("no program")
    (tmp_path / "7z").chmod(0o755)
    seven_zip(tmp_path, codec="  D     21 LZMA2")
    with pytest.raises(DataError, match="no reader of RAR"):
        unpack(tmp_path / "a.rar", tmp_path / "out")
    seven_zip(tmp_path)
    assert [file.member for file in unpack(tmp_path / "a.rar", tmp_path / "out")] == ["a"]
    assert (tmp_path / "out" / "a").read_text() == "data"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"linked": True}, "is no plain file"),
        ({"content": "long data"}, "has 9 bytes, its header declares 4"),
    ],
)
def test_output_of_seven_zip_is_checked(how, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(rar, "find_reader", rar.find_program)
    monkeypatch.setenv("PATH", str(tmp_path))
    write_rar4(tmp_path / "a.rar", [Entry("a")])
    seven_zip(tmp_path, **how)
    with pytest.raises(DataError, match=reason):
        unpack(tmp_path / "a.rar", tmp_path / "out")
    assert everything(tmp_path) == {"a.rar", "7zz"}


def real_archive(name):
    folder = os.environ.get("TVIT_TEST_DATA")
    if not folder:
        pytest.skip("TVIT_TEST_DATA is not set")
    return Path(folder) / "archives" / name


@pytest.mark.real
@pytest.mark.parametrize("name", ["UCF101-mini.rar", "UCF101-mini-solid.rar"])
@pytest.mark.parametrize("find", [rar.find_pybit7z, rar.find_program])
def test_rar_gives_the_same_bytes_as_the_zip_with_each_reader(name, find, tmp_path, monkeypatch):
    if find() is None:
        pytest.skip("not installed")
    monkeypatch.setattr(rar, "find_reader", find)
    wanted = {}
    with zipfile.ZipFile(real_archive("UCF101-mini-flat.zip")) as archive:
        for member in archive.namelist():
            wanted[Path(member).name] = hashlib.sha256(archive.read(member)).hexdigest()
    unpacked = unpack(real_archive(name), tmp_path / "out")
    assert len(unpacked) == (8 if "solid" in name else 48)
    assert {file.path.name: file.sha256 for file in unpacked}.items() <= wanted.items()
