"""HTML pages: parsed, and opened in a headless browser."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from needs import need

VOID = {"meta", "link", "img", "br", "input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")


class Page(HTMLParser):
    """References that a page loads, its links, scripts, tags and text; asserts that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = [value or "" for name, value in attributes if name in ("src", "href", "data")]
        (self.links if tag == "a" else self.references).extend(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        else:
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


@contextmanager
def opened_in_chromium(path: Path, *, width: int = 1280) -> Iterator[Any]:
    """Playwright's page of a file; asserts afterwards that the console has no errors. Skips without a browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    need("playwright")
    need(program=browser, name="chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page, errors = found.new_page(viewport={"width": width, "height": 800}), []
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.absolute().as_uri())
        yield page
        found.close()
    assert errors == []
