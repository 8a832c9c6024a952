"""The built site in a browser, as a reader sees it; `make book` builds the site."""

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
PREFIX = "/minipeft/"  # the path in site_url
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Two widths, in light and dark. Pages of text alone are tested in two of the four
# views.
VIEWS = [(1280, "light"), (390, "light"), (390, "dark"), (1280, "dark")]
TEXT_VIEWS = VIEWS[::2]
LOOK = """() => ({
  overflow: document.documentElement.scrollWidth - innerWidth,
  broken: [...document.images].filter(
    i => getComputedStyle(i).display != "none" && !i.naturalWidth).map(i => i.src),
  raw: document.querySelectorAll(".arithmatex").length,
  unseen: [...document.querySelectorAll("math")].filter(
    m => m.checkVisibility() && !m.getBoundingClientRect().width).length,
  font: !document.querySelector("math") || document.fonts.check('16px "Book Math"'),
})"""
DARK = {"light": "default", "dark": "slate"}
RESTED = "() => document.documentElement.scrollWidth <= innerWidth"
SETTLED = """scheme => document.body.dataset.mdColorScheme == scheme
  && document.fonts.status == "loaded" && [...document.images].every(
    i => i.complete || getComputedStyle(i).display == "none")"""

needs_site = pytest.mark.skipif(not PAGES, reason="no built book: run `make book`")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")


class Links(HTMLParser):
    """Collects the links of a page, and the anchors that links may point to."""

    def __init__(self, text: str):
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.ids.add(value or "")
            elif name in ("href", "src") and value and (tag, name) != ("base", "href"):
                self.targets.append(value)


@needs_site
def test_every_internal_link_leads_somewhere():
    pages = {page: Links((SITE / page).read_text("utf-8")) for page in PAGES}
    dead = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path, fragment = urldefrag(unquote(target))
            place = _resolve(page, path)
            ids = pages[place].ids if place in pages else {fragment}
            if not (SITE / place).is_file() or (fragment and fragment not in ids):
                dead.append(f"{page}: {target}")
    assert dead == []


def _resolve(page: str, path: str) -> str:
    if not path:
        return page
    if path.startswith(PREFIX):
        place = SITE / path.removeprefix(PREFIX)
    else:
        place = (SITE / page).parent / path
    if place.is_dir():
        place /= "index.html"
    return place.resolve().relative_to(SITE.resolve()).as_posix()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site below its prefix, without a log."""

    def translate_path(self, path: str) -> str:
        return super().translate_path("/" + path.removeprefix(PREFIX))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    flags = ["--no-sandbox", "--disable-gpu"]
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def context(browser):
    with browser.new_context() as shared:
        yield shared


@pytest.fixture
def visit(context):
    """Open an address; any error in the browser fails the test."""
    complaints: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def open_page(address: str):
        home = "/".join(address.split("/")[:3])
        page.on("request", lambda r: _external(r.url, home, complaints))
        page.goto(address)
        return page

    yield open_page
    page.close()
    assert complaints == []


def _external(url: str, home: str, complaints: list[str]) -> None:
    if not url.startswith((home, "data:", "blob:")):
        complaints.append(f"external request: {url}")


@needs_site
@needs_browser
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_both_widths_and_both_lights(visit, address, name):
    """The page is read from disk, which is faster; the error page needs a server."""
    late = pytest.importorskip("playwright.sync_api").TimeoutError
    page = visit(address + name if name == "404.html" else (SITE / name).as_uri())
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    for width, scheme in TEXT_VIEWS if name.startswith("api/") else VIEWS:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(SETTLED, arg=DARK[scheme])
        with contextlib.suppress(late):  # a layout is slow on a busy machine
            page.wait_for_function(RESTED, timeout=5000)
        seen = page.evaluate(LOOK)
        assert seen == {
            "overflow": 0,
            "broken": [],
            "raw": 0,
            "unseen": 0,
            "font": True,
        }, f"{name} at {width} px, {scheme}"


@needs_site
@needs_browser
@pytest.mark.parametrize("way", ["http", "file"])
def test_search_finds_part_of_an_identifier(visit, address, way):
    home = address if way == "http" else f"{SITE.as_uri()}/"
    page = visit(f"{home}index.html")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.click(".md-search__input")
    page.type(".md-search__input", "quantize")
    page.wait_for_selector(".md-search-result__item", timeout=30_000)
    links = page.eval_on_selector_all(
        ".md-search-result__link", "links => links.map(link => link.href)"
    )
    assert any("dequantize" in link or "quantize" in link for link in links)
