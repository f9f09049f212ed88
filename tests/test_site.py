"""The documentation site: links, the reference, the calculator, and how pages look in a headless browser.

``make test-page`` builds the site and runs this: it needs a browser, which pip does not install.
"""

import ast
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from browser import Browser
from sources import ROOT, SRC

import fwpkm

pytestmark = pytest.mark.browser
SITE = ROOT / "site"
LOUD = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
LOOKED_AT = ("index.html", "results.html", "sizes.html", "api/torch.html", "start/keras.html")


class Page(HTMLParser):
    """The ids of a page, where its links lead, what it loads, and its text by the id above it."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.text = set(), [], [], {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
            self.above = found["id"]
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(found["href"])

    def handle_data(self, data):
        self.text[self.above] = self.text.get(self.above, "") + data

    above = ""


@pytest.fixture(scope="module")
def pages():
    assert (SITE / "index.html").exists(), "there is no site: make docs"
    return {path.relative_to(SITE).as_posix(): Page(path) for path in SITE.rglob("*.html")}


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


def target_of(name, link):
    """The page, or file, and the anchor of a link on a page of the site; None for what leads out of it."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path = unquote(parts.path)
    there = (SITE / name).parent / path if path else SITE / name
    there = there / "index.html" if there.is_dir() else there
    return there.resolve(), unquote(parts.fragment)


def test_every_link_leads_somewhere(pages):
    assert len(pages) > 30
    broken, seen = [], 0
    for name, page in pages.items():
        if name == "404.html":  # its links begin at the root of a server
            continue
        for link in page.links + page.loaded:
            if (target := target_of(name, link)) is None:
                continue
            path, anchor = target
            seen += 1
            ids = pages[path.relative_to(SITE).as_posix()].ids if path.suffix == ".html" and path.exists() else set()
            if not path.exists() or (anchor and anchor not in ids):
                broken.append((name, link))
    assert broken == []
    assert seen > 1000


def test_nothing_is_loaded_from_the_net(pages):
    for name, page in pages.items():
        assert [link for link in page.loaded if urlsplit(link).netloc] == [], name
    for sheet in SITE.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")) == [], sheet


def exported(module):
    """The public names of a module, as they stand in its source: frameworks need not be there."""
    path = SRC / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(x, "id", "") for x in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in defined if not name.startswith("_")]


def packages():
    """Those whose names are public: the package, its backends, its integrations, its kernels."""
    names = sorted(x.stem for x in (SRC / "fwpkm/integrations").iterdir() if not x.name.startswith("_"))
    backends = [f"fwpkm.backends.{name}" for name in ("torch", "jax", "keras")]
    return ["fwpkm", *backends, *(f"fwpkm.integrations.{name}" for name in names), "fwpkm.kernels"]


@pytest.mark.parametrize("module", packages())
def test_every_public_name_has_an_entry(pages, module):
    ids = set().union(*(page.ids for name, page in pages.items() if name.startswith("api/")))
    assert [name for name in exported(module) if f"{module}.{name}" not in ids] == []


def test_entries_of_functions_give_shapes_and_errors(pages):
    """Also where a backend's own docstring is one line, and where Keras takes another backend's function."""
    for backend in ("torch", "jax", "keras"):
        text = pages[f"api/{backend}.html"].text
        for function in ("apply", "flush", "lookup", "chunk_update", "reset", "pending", "pack"):
            entry = text[f"fwpkm.backends.{backend}.{function}"]
            assert "Raises:" in entry, (backend, function)
            assert "ValueError" in entry, (backend, function)
        said = " ".join(text[f"fwpkm.backends.{backend}.apply"].split())
        for part in ("cu_seqlens", "[B, T, H*Dk]", "[B+1]", "NaN for those that are not finite"):
            assert part in said, (backend, part)
        assert "[B, T, hidden_size]" in "".join(x for name, x in text.items() if f"{backend}.FwPKM" in name)


# In the browser


@pytest.fixture
def open_page(browser):
    """A page as somebody sees it who comes for the first time."""

    def opened(name, width, dark):
        browser.open(SITE / name, width, dark)
        browser.evaluate("localStorage.clear()")
        browser.open(SITE / name, width, dark)
        return browser

    return opened


def quiet(browser):
    """What the page said, and what it took from elsewhere than its own files."""
    requests = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    sent = [request["request"]["url"] for request in requests]
    said = [event["params"] for event in browser.events if event["method"] in LOUD]
    return said, [url for url in sent if not url.startswith((SITE.as_uri(), "data:", "blob:", "about:"))]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_page_fits_and_is_quiet(open_page, name, width, dark):
    browser = open_page(name, width, dark)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(background[:3]) < 80) if dark else (min(background[:3]) > 240)
    assert quiet(browser) == ([], [])
    assert browser.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")


@pytest.mark.parametrize("width", [375, 1280])
def test_search_finds_a_word(open_page, width):
    browser = open_page("index.html", width, False)
    found = browser.evaluate("""(async () => {
      document.querySelector("label[for=__search]").click();
      const input = document.querySelector("input[name=query]");
      input.focus(), input.value = "overshoots", input.dispatchEvent(new Event("input", { bubbles: true }));
      input.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
      for (let i = 0; i < 100; i++) {
        const links = [...document.querySelectorAll(".md-search-result__link")].map((link) => link.href);
        if (links.length) return links;
        await new Promise((done) => setTimeout(done, 100));
      }
      return [];
    })()""")
    assert any("SPEC.html" in link for link in found)
    assert quiet(browser) == ([], [])


# The calculator


def sizes(browser, name, *arguments):
    """What a function of sizes.js gives."""
    return browser.evaluate(f"fwpkmSizes.{name}({', '.join(map(json.dumps, arguments))})")


@pytest.mark.parametrize(
    "chosen",
    [
        {"key_dim": 6, "value_dim": 5, "num_heads": 1, "num_subkeys": 7, "top_k": 3, "chunk_size": 4, "lookahead": 1},
        {"key_dim": 8, "value_dim": 3, "num_heads": 2, "num_subkeys": 4, "top_k": 2, "chunk_size": 9, "lookahead": 0},
        {"key_dim": 4, "value_dim": 16, "num_heads": 3, "num_subkeys": 9, "top_k": 1, "chunk_size": 5, "lookahead": 4},
    ],
)
def test_the_calculator_counts_the_bytes_of_states(open_page, chosen):
    browser = open_page("sizes.html", 1280, False)
    cfg, tokens = fwpkm.FwPKMConfig(**chosen), 11
    counted = sizes(browser, "bytes", {**chosen, "hidden_size": 10, "rows": 3, "tokens": tokens})
    be, rng = fwpkm.reference, np.random.default_rng(0)
    memory = be.init_memory(cfg)
    state = be.init_state(cfg, memory, 1)
    assert counted["values"] == memory.values.nbytes
    assert counted["keys"] == memory.keys.nbytes
    assert counted["state"] == be.nbytes(state)
    assert counted["states"] == be.nbytes(be.init_state(cfg, memory, 3))
    query = rng.normal(size=(1, tokens, cfg.num_heads * cfg.key_dim)).astype("f4")
    _, state, _ = be.apply(cfg, state, query, rng.normal(size=(1, tokens, cfg.value_dim)).astype("f4"))
    assert counted["keys"] < be.pack(cfg, state, memory).nbytes <= counted["packed"]

    from fwpkm.backends.torch import FwPKM

    assert counted["parameters"] == sum(p.numel() for p in FwPKM(10, cfg).parameters())


def test_the_calculator_refuses_what_the_configuration_refuses(open_page):
    browser = open_page("sizes.html", 1280, False)
    good = {"key_dim": 4, "value_dim": 4, "num_heads": 1, "num_subkeys": 4, "top_k": 2, "chunk_size": 4, "lookahead": 1}
    rest = {"hidden_size": 8, "rows": 1, "tokens": 1}
    assert sizes(browser, "refusal", good | rest) == ""
    for change in ({"key_dim": 3}, {"top_k": 5}, {"lookahead": 4}, {"num_subkeys": 0}, {"chunk_size": 1.5}):
        with pytest.raises(ValueError, match=next(iter(change))):
            fwpkm.FwPKMConfig(**good | change)
        assert next(iter(change)) in sizes(browser, "refusal", good | rest | change)
    browser.evaluate("document.querySelector('input[name=key_dim]').value = 7")
    browser.evaluate("document.querySelector('.sizes-form').dispatchEvent(new Event('input'))")
    assert browser.evaluate("document.querySelector('.sizes-output').textContent") == "key_dim must be even."


def measured(page):
    """Every cell that begins with a number, by section, table, row and column of a page."""
    found, section, caption, head = {}, "", "", []
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("**"):
            caption = line.strip("* ").partition(":")[0]
        elif line.startswith("|"):
            row, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            if not head:
                table, head = row or caption, cells
            for column, cell in zip(head, cells):
                if number := re.match(r"[\d.]+", cell):
                    found.setdefault((section, table, row, column), float(number[0]))
        if not line.startswith("|"):
            head = []
    return found


def test_the_times_of_the_calculator_are_rows_of_the_pages(open_page):
    browser = open_page("sizes.html", 1280, False)
    columns = {"kernels.md": ("forward", "forward + backward"), "benchmarks.md": ("forward, ms", "training step, ms")}
    pages, rows = {page: measured(page) for page in columns}, browser.evaluate("fwpkmSizes.measured")
    assert len(rows) >= 20
    for row in rows:
        for column, name in zip(columns[row["page"]], ("forward", "train")):
            assert pages[row["page"]][row["section"], row["table"], row["row"], column] == row[name], row
    nearest = sizes(browser, "nearest", "H200, Triton kernels", {"num_subkeys": 900, "rows": 8, "tokens": 4096})
    assert nearest[0]["row"] == "N=1024², one table"
