"""HTML pages: parsed, and opened in a headless browser."""

import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from needs import need

VOID = {"meta", "link", "img", "br"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")


class Page(HTMLParser):
    """References, tags and text of a page; asserts that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def trouble_in_chromium(path: Path, *, dark: bool = False) -> list[str]:
    """Console messages of a page in an offline headless browser; skips without one."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    need(program=browser, name="chromium")
    assert browser is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", path.absolute().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "</main>" in done.stdout, done.stderr
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
