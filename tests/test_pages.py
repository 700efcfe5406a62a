"""Pages: whole in themselves, safe with hostile names, and right in a real browser."""

from __future__ import annotations

import dataclasses
import html.parser
import re
import shutil

import pytest

from architectures import ARCHITECTURES
from mra_cli.analyze import analyze
from mra_cli.checkpoint import Checkpoint
from mra_cli.inputs import make_samples
from mra_cli.methods import make_method
from mra_cli.pages import analyze_page, search_page
from mra_cli.pages.charts import Series, chart
from mra_cli.pages.elements import Html, tag
from mra_cli.search import SearchSetup, Target, search

HOSTILE = 'evil"><script>alert(1)</script>&amp;'


@pytest.fixture(scope="module")
def reports():
    """Of a tiny vision model: pictures need no tokenizer."""
    model = next(a for a in ARCHITECTURES if a.name == "dinov2").build()
    checkpoint = Checkpoint(HOSTILE, model, None, None, "none")
    sides = [make_samples(checkpoint, count=2, seed=seed) for seed in (0, 1)]
    method = make_method("mra", 0.25)
    analysis = analyze(checkpoint, sides[0], method, [0.25, 0.5])
    setup = SearchSetup(method, (Target("min-cosine", 0.5),), budgets=(0.25, 0.5))
    return analysis, search(checkpoint, *sides, setup)


@pytest.fixture(scope="module", params=["analyze", "search"])
def page(request, reports):
    analysis, found = reports
    return analyze_page(analysis) if request.param == "analyze" else search_page(found)


class Checker(html.parser.HTMLParser):
    """Every element is closed, in order, and every id is there once."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.names = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [v for k, v in attrs if k in ("href", "src", "srcset", "data", "action")]
        if tag not in ("br", "input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages_are_well_formed_and_whole(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids) > 3
    assert checker.links == []
    assert not re.search(r"url\(|@import|https?://", page)
    assert {"svg", "table", "h1", "main", "dl"} <= set(checker.names)
    assert "script" not in checker.names


def test_hostile_names_are_text(page):
    assert "<script" not in page
    assert "evil&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;" in page


def test_text_is_escaped_once():
    assert tag("p", "a<b", Html("<i>c</i>"), title='"') == '<p title="&quot;">a&lt;b<i>c</i></p>'
    assert tag("input", checked=True, name=None) == "<input checked>"


def test_figures_of_the_report_are_on_the_page(reports):
    analysis, found = reports
    page = analyze_page(analysis)
    for row in analysis.by_site:
        assert f">{row.error:.3f}<" in page
    for figures in analysis.by_budget:
        assert f"{figures.damage.cosine_mean:.4f}" in page
        assert figures.summary in page
    assert analysis.provenance.inputs_digest in page
    page = search_page(found)
    assert found.answer in page
    assert page.count('class="heat') > len(found.by_site)
    budgets = found.frontier[found.chosen].budgets
    errors = page[: page.index("attention mass left out</h4>")]
    assert len(re.findall(r'class="heat[^"]*mark', errors)) == sum(b < 1 for b in budgets)


def test_a_search_without_a_plan_has_a_page(reports):
    _, found = reports
    none = dataclasses.replace(
        found, plan=None, chosen=None, uniform=None, answer="No plan, alas.", speeds=(), trials=()
    )
    page = search_page(none)
    assert "No plan, alas." in page and "Framed" not in page


def test_charts_put_points_where_they_belong():
    drawn = chart(
        [Series("it", [(1, 10.0), (2, 100.0), (4, 1000.0)], "lined dots", 1)],
        x_label="x",
        y_label="y",
        summary="s",
        doubling_x=True,
        log_y=True,
    )
    (points,) = re.findall(r'points="([\d., ]+)" class="line', drawn)[:1]
    (x1, y1), (x2, y2), (x3, y3) = (map(float, p.split(",")) for p in points.split())
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11) and x2 > x1
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.11) and y2 < y1
    assert ">1000<" in drawn and drawn.count("<title>") == 1


# --- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright; pip install 'mra-cli[browser]'"
    )
    found = [path for name in ("chromium", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no browser; apt-get install chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def shown(browser, page, tmp_path):
    """The page in a browser that reports every request and every complaint."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    complaints = []

    def show(**options):
        tab = browser.new_page(java_script_enabled=False, **options)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("request", lambda request: complaints.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield show
    assert set(complaints) == {path.as_uri()}, "nothing else was asked for, nothing complained"


def views(tab, group):
    return [view.is_visible() for view in tab.locator(f"#{group}-0 ~ .views > .view").all()]


def test_keys_reach_and_switch_everything(shown):
    tab = shown()
    assert views(tab, "layers") == [True, False, False]
    reached = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        focused = tab.locator(":focus")
        if not focused.count():
            break
        reached.append(focused.get_attribute("id") or focused.get_attribute("aria-label"))
        if reached[-1] == "layers-0":
            tab.keyboard.press("ArrowRight")
            assert views(tab, "layers") == [False, True, False]
    assert {"layers-0", "heads-0"} <= set(reached)
    tables = tab.locator("[role=region]:visible")
    assert {region.get_attribute("aria-label") for region in tables.all()} <= set(reached)


def test_dark_is_dark_and_words_stay_readable(shown):
    """Contrast by WCAG 2: 4.5 for text, 3 for numbers on a heat map, in both themes."""
    light = [_contrasts(shown(color_scheme=scheme)) for scheme in ("light", "dark")]
    for worst_text, worst_heat, _ in light:
        assert worst_text >= 4.5 and worst_heat >= 3.0
    assert light[0][2] > 0.8 > 0.1 > light[1][2]


def _contrasts(tab):
    """Least contrast of paragraphs and headings, of heat map cells, and the paper's luminance."""
    colours = """nodes => nodes.map(node => {
        const ground = n => { const c = getComputedStyle(n).backgroundColor;
            return c === 'rgba(0, 0, 0, 0)' && n.parentElement ? ground(n.parentElement) : c };
        const paint = (c) => { const canvas = document.createElement('canvas');
            const brush = canvas.getContext('2d'); brush.fillStyle = c; brush.fillRect(0, 0, 1, 1);
            return [...brush.getImageData(0, 0, 1, 1).data.slice(0, 3)] };
        return [paint(getComputedStyle(node).color), paint(ground(node))] })"""

    def least(selector):
        pairs = tab.locator(selector).evaluate_all(colours)
        assert pairs
        return min(_contrast(ink, ground) for ink, ground in pairs)

    ((_, paper),) = tab.locator("h1").evaluate_all(colours)
    return least("h1, h2, h3, p, dt, dd, caption"), least("td.heat"), _luminance(paper)


def _luminance(colour):
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(first, second):
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_phones_scroll_tables_and_not_the_page(shown):
    tab = shown(viewport={"width": 380, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380


def test_paper_shows_every_view(shown):
    tab = shown()
    tab.emulate_media(media="print")
    assert views(tab, "layers") == [True] * 3
    assert all(views(tab, "heads"))
    assert tab.pdf()[:5] == b"%PDF-"
