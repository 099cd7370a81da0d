"""A page in a real browser: what it makes of it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 240.0
"""Seconds, on a machine that is busy with something else."""
TIME_OF_THE_PAGE_MS = 3000
"""That the page believes to have passed: pictures that cannot be loaded have failed by then."""
CONSOLE = re.compile(r"CONSOLE[^\"]*\"(.*)\", source:")
VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass(frozen=True)
class Seen:
    """A page as it stands in the browser.

    Attributes:
        title: of the document, by then.
        elements: of each its tag and attributes.
        text: what is not script or style, with the values of all attributes.
        console: what scripts and the browser wrote there.
    """

    title: str
    elements: list[tuple[str, dict[str, str]]]
    text: str
    console: list[str]


def find_browser() -> str:
    """The program. Fails where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found is not None, (
        "this test looks at a report in a real browser: install Chromium (Debian: apt-get install chromium; "
        f"any of {', '.join(NAMES)} on the path serves)"
    )
    return found


def version() -> str:
    return subprocess.run([find_browser(), "--version"], capture_output=True, text=True, check=True).stdout.strip()


def look_at(page: Path, home: Path) -> Seen:
    """Open a page.

    Args:
        home: a folder that the browser may write to.
    """
    words = [
        find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--enable-logging=stderr", f"--user-data-dir={home / 'profile'}",
        f"--virtual-time-budget={TIME_OF_THE_PAGE_MS}", "--dump-dom", page.resolve().as_uri(),
    ]  # fmt: skip
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=PATIENCE, check=True)
    told = done.stderr.decode(errors="replace")
    found = _Dom(done.stdout.decode())
    return Seen(found.title, found.elements, found.text, CONSOLE.findall(told))


class _Dom(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.title, self.text = "", ""
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self.text += "\n".join(["", *attributes.values(), ""])
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "title" and "svg" not in self._open:
            self.title += data
        if inside not in ("script", "style"):
            self.text += data
