"""The page in headless Chromium: no complaint, nothing wider than a phone, something to be seen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from mergebench.evaluation import page
from tests.evaluation.page import documents

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr", "--log-level=0",
    "--virtual-time-budget=2000",
]  # fmt: skip

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a page of everything."""
    found = documents.write_all(tmp_path_factory.mktemp("browser") / "merged")
    page.write(found)
    return found


def chromium(folder: Path, file: str, *options: str) -> tuple[str, str]:
    """What it prints, and what the page's console says."""
    assert CHROMIUM is not None
    place = (folder / file).resolve().as_uri()
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", *options, place],
        capture_output=True, text=True, timeout=60, check=True, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_it_loads_without_a_complaint(folder: Path) -> None:
    seen, console = chromium(folder, "report.html", "--dump-dom")
    assert console == ""
    assert len(re.findall(r"<section>", seen)) == 7
    assert seen.count("<svg") == 14 + 6  # six are drawn for wide and for narrow windows


def test_the_console_would_be_seen(folder: Path) -> None:
    """What the test before listens to: the page's own policy refuses a script, and says so."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "bad.html").write_text(text.replace("</body>", "<script>document.title='x'</script></body>"))
    _, console = chromium(folder, "bad.html", "--dump-dom")
    assert "Content Security Policy" in console


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(folder: Path, width: int) -> None:
    """In a frame, as windows have a least width; all lists open."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("<details>", "<details open>")
    size = "document.documentElement.scrollWidth + ' ' + document.body.getBoundingClientRect().height"
    frame = f'<iframe width="{width}" height="500" style="border:0" srcdoc="SOURCE"></iframe>'
    source = (
        text.replace("</body>", f"<script>parent.document.title = {size}</script></body>")
        .replace("&", "&amp;")
        .replace('"', "&quot;")
    )
    (folder / "frame.html").write_text(frame.replace("SOURCE", source))
    seen, _ = chromium(folder, "frame.html", "--dump-dom")
    found = re.search(r"<title>(\d+) ([\d.]+)</title>", seen)
    assert found is not None
    assert int(found[1]) == width
    assert float(found[2]) > 3000


@pytest.mark.parametrize("dark", [False, True])
def test_there_is_something_to_see(folder: Path, dark: bool) -> None:
    """The paper's colour at the edge, and many others on it, by day and by night."""
    shot = folder / f"{dark}.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(folder, "report.html", "--window-size=1280,2400", f"--screenshot={shot}", *scheme)
    image = Image.open(shot).convert("RGB")
    colours = image.getcolors(1 << 24)
    assert image.size == (1280, 2400)
    assert image.getpixel((0, 0)) == ((0x15, 0x17, 0x1A) if dark else (255, 255, 255))
    assert colours is not None and len(colours) > 200
    blue = (0x4A, 0xA8, 0xE0) if dark else (0x00, 0x72, 0xB2)  # the bars of what was merged
    assert {colour: count for count, colour in colours}.get(blue, 0) > 3000
