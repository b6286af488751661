"""Unpacking archives: complete, safe against hostile ones, clean after a kill."""

import functools
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from archives import WRITERS, Entry, deflated_zeros, write_rar4, write_tar, write_zip

from tvit_cli import files
from tvit_cli.data import rar
from tvit_cli.data.archive_safety import Limits, Member, check_members
from tvit_cli.data.archives import detect_kind, store, unpack
from tvit_cli.errors import DataError, RunError

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


def test_members_that_lie_about_their_size_are_caught(tmp_path):
    write_zip(tmp_path / "a.zip", [Entry("a", b"x" * 100, declared=10)])  # its CRC is that of 100 bytes
    with pytest.raises(DataError):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    write_tar(tmp_path / "a.tar", [Entry("a", b"x" * 100, declared=50_000)])
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert everything(tmp_path) == {"a.zip", "a.tar"}


def test_members_that_overlap_are_refused():
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
    child = f"""
import resource, signal, sys
from pathlib import Path
from tvit_cli.data.archives import unpack
from tvit_cli.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    unpack(Path({str(tmp_path / "a.zip")!r}), Path({str(tmp_path / "out")!r}))
except RunError as error:
    sys.exit(str(error))
"""
    ended = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=False)
    assert "disk full while unpacking a.zip" in ended.stderr and "200 kB more" in ended.stderr
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
