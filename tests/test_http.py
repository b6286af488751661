"""Download of one file: resumed, verified, with mirrors."""

import hashlib
import random
import signal
import ssl
import subprocess
import sys
import time
import zipfile

import loopback
import pytest
from loopback import Page

from tvit_cli import files
from tvit_cli.data.http import Download, Http, MirrorsFailed, PermanentError, Retry, TransientError
from tvit_cli.data.transfer import RangeFile, RemoteZip
from tvit_cli.errors import RunError
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


def test_retries_are_shown_as_they_happen(server, tmp_path):
    events = []
    url = server.add("/a", BODY, statuses=[(503, {})])
    get([url], tmp_path / "a", report=events.append)
    assert events[0] == Note(f"{url}: HTTP 503 Service Unavailable; attempt 2 of 6 in 1 s")


def test_back_off_doubles_up_to_its_bound():
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


def test_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MirrorsFailed, match=r"no connection .*\(2 attempts\)"):
        get(["http://localhost:9/a"], tmp_path / "a", http=quick(attempts=2))


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


def test_context_that_does_not_verify_is_never_used():
    blind = ssl.create_default_context()
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    with pytest.raises(ValueError, match="never used"):
        Http(trust=blind).open("https://localhost/")


def test_full_disk_is_seen_before_and_names_what_is_needed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda _: 100)
    url = server.add("/a", BODY)
    with pytest.raises(RunError, match=r"needs 300 kB, 100 bytes are free.*--data-directory"):
        get([url], tmp_path / "a")
    assert names(tmp_path) == set()


def test_disk_that_fills_up_keeps_the_part_for_later(server, tmp_path):
    url = server.add("/a", BODY)
    child = f"""
import resource, signal, sys
from pathlib import Path
from tvit_cli.data.http import Download
from tvit_cli.errors import RunError
from tvit_cli.results import Progress
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    Download(Path({str(tmp_path / "a")!r})).fetch([{url!r}])
except RunError as error:
    sys.exit(str(error))
"""
    ended = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=False)
    assert "disk full while" in ended.stderr and "200 kB more are needed" in ended.stderr
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


def test_members_near_each_other_share_a_request(server, tmp_path):
    body = make_zip(tmp_path / "a.zip", size=5_000)
    remote = RemoteZip(server.add("/a.zip", body), http=quick(), most_directory=10**6)
    assert [len(stream.read()) for _, stream in remote.read([remote.infos[3], remote.infos[5]])] == [
        5_000
    ] * 2
    assert len(server.requests) == 2


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


def test_large_directory_and_no_zip_are_refused(server, tmp_path):
    with pytest.raises(PermanentError, match="directory cannot be read"):
        RemoteZip(server.add("/page", b"<html>" * 100), http=quick(), most_directory=10**6)
    file = RangeFile(server.add("/b", BODY), quick(), most_read=1000)
    with pytest.raises(PermanentError, match="at once, limit 1000"):
        file.read(2000)


def test_range_longer_than_requested_is_not_read(server):
    head = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/1000000\r\nContent-Length: 1000000\r\n\r\n"
    file = RangeFile(server.add("/a", b"", raw=[head, bytes(1_000_000)]), quick())
    assert file.received == 32 * 1024


def test_zip64_directory_is_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    body = make_zip(tmp_path / "a.zip", 5, size=100)
    assert b"PK\x06\x06" in body
    remote = RemoteZip(server.add("/a.zip", body), http=quick(), most_directory=10**6)
    assert [len(stream.read()) for _, stream in remote.read(remote.infos)] == [100] * 5
