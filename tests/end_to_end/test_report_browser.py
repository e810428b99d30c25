"""The report as a reader meets it: in a real browser, offline."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pds_ray.report.page import write_report
from tests.support.synthetic_run import HOSTILE, add_comparison, add_evaluation, make_run

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium found on the path")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
OPENS_WITHIN_S = 15.0
CAPTIONS = [
    *HOSTILE,
    "Ada's red ring",
    "ada's blue ring",
    "Zebra",
    "zebra",
    "a ring, red and small",
]
PAIRS = 70  # more than one page of cards


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser: Any) -> Callable[..., Any]:
    """Opens a file and allows no message, no error, and no request but for the file itself."""

    @contextmanager
    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        complaints: list[str] = []
        page.on(
            "console", lambda message: complaints.append(f"console {message.type}: {message.text}")
        )
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: complaints.append(request.url) if foreign(request.url) else None,
        )

        def foreign(url: str) -> bool:
            return not url.startswith("data:") and url.partition("#")[0] != path.as_uri()

        page.goto(path.as_uri())
        yield page
        assert complaints == []
        context.close()

    return open_page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("browser") / "run", pairs=PAIRS, captions=CAPTIONS)
    add_evaluation(made.path, backbones=(HOSTILE[0], HOSTILE[7]))
    add_comparison(
        made.path.parent,
        {(HOSTILE[1], PAIRS): "sets/x", ("pds", PAIRS): "run", ("pds", 9): "sets/y"},
    )
    return Path(write_report(str(made.path)))


@pytest.fixture(scope="module")
def comparison(report: Path) -> Path:
    return Path(write_report(str(report.parents[1])))


def numbers(page: Any) -> list[int]:
    """The pairs on the page, in their order."""
    return page.eval_on_selector_all(
        ".card", "cards => cards.map(card => Number(card.dataset.pair))"
    )


def scroll_through(page: Any) -> None:
    """To the end and back, so that everything lazy has been drawn."""
    page.evaluate(
        """async () => {
            for (let y = 0; y < document.documentElement.scrollHeight; y += 500) {
                scrollTo(0, y);
                await new Promise(done => setTimeout(done, 60));
            }
        }"""
    )
    for chart in page.query_selector_all(".chart"):
        chart.wait_for_selector(".main-svg", state="attached")
    page.evaluate("scrollTo(0, 0)")


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait; the browser's own waiting needs eval, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def no_harm(page: Any) -> None:
    assert page.evaluate("window.hacked") is None
    assert page.query_selector("img[src='x'], [onerror], main script, a[href^='https:']") is None


def test_everything_draws_and_nothing_is_asked_for(opened: Any, report: Path) -> None:
    with opened(report) as page:
        scroll_through(page)
        titles = page.eval_on_selector_all("h2", "nodes => nodes.map(node => node.textContent)")
        assert titles[:3] == ["The pairs", "Evaluation", "Clusters and matching"]
        assert (
            page.eval_on_selector_all("nav a", "links => links.map(link => link.textContent)")
            == titles
        )
        assert page.locator(".chart").count() == 8
        assert page.locator("h1").inner_text().startswith(f"{PAIRS} pairs from")
        assert page.title().startswith(f"{PAIRS} pairs")
        assert page.get_attribute("html", "lang") == "en"
        assert page.locator(".chart:not([aria-label])").count() == 0
        assert page.locator("img:not([alt])").count() == 0
        broken = "images => images.filter(image => image.complete && !image.naturalWidth).length"
        assert page.eval_on_selector_all("img", broken) == 0
        no_harm(page)


@pytest.mark.long
def test_hostile_captions_are_shown_as_text(opened: Any, report: Path) -> None:
    with opened(report) as page:
        shown = page.eval_on_selector_all(".words", "nodes => nodes.map(node => node.textContent)")
        assert shown[: len(HOSTILE)] == HOSTILE
        scroll_through(page)
        for number in range(len(HOSTILE)):
            page.locator(f"[data-pair='{number}']").click()
            assert page.locator("#detail-caption").text_content() == HOSTILE[number]
            page.keyboard.press("Escape")
        chart = page.locator("[data-figure='evaluation-0'] .legendtext")
        assert chart.first.text_content() == HOSTILE[0]
        no_harm(page)


@pytest.mark.long
def test_hovering_over_a_map_shows_text(opened: Any, report: Path) -> None:
    with opened(report) as page:
        scroll_through(page)
        page.locator("[data-figure='map-image']").scroll_into_view_if_needed()
        seen = set()
        for number in (0, 1, 7):
            page.evaluate(
                "n => Plotly.Fx.hover(document.querySelector('[data-figure=map-image]'),"
                " [{curveNumber: 1, pointNumber: n}])",
                number,
            )
            page.wait_for_selector("[data-figure='map-image'] .hovertext")
            seen.add(page.locator("[data-figure='map-image'] .hovertext").first.text_content())
        assert any("<script>window.hacked=1</script>" in text for text in seen)
        no_harm(page)


@pytest.mark.long
def test_search_narrows_the_cards(opened: Any, report: Path) -> None:
    with opened(report) as page:
        assert len(numbers(page)) == 60
        page.fill("#search", "RING red")
        assert numbers(page) == [
            n
            for n, text in enumerate(CAPTIONS)
            if {"ring", "red"} <= set(re.findall(r"\w+", text.lower()))
        ]
        assert page.locator("#found").inner_text() == f"2 pairs of {PAIRS}"
        assert page.eval_on_selector_all(
            "mark", "nodes => nodes.map(node => node.textContent)"
        ) == [
            "red",
            "ring",
        ] * 1 + ["ring", "red"]
        page.fill("#search", "<script>")
        assert numbers(page) == [n for n, text in enumerate(CAPTIONS) if "<script>" in text]
        page.fill("#search", "nothing of the kind")
        assert numbers(page) == []
        page.fill("#search", "")
        assert len(numbers(page)) == 60
        no_harm(page)


@pytest.mark.long
def test_sorting(opened: Any, report: Path) -> None:
    from pds_ray import load_distilled

    rows = load_distilled(str(report.parent)).records
    orders: dict[str, Callable[[dict[str, Any]], Any]] = {
        "pair": lambda row: row["pair"],
        "cosine-up": lambda row: (round(row["cosine"], 4), row["pair"]),
        "cosine-down": lambda row: (-round(row["cosine"], 4), row["pair"]),
        "shared-up": lambda row: (row["shared"], row["pair"]),
        "shared-down": lambda row: (-row["shared"], row["pair"]),
        "caption": lambda row: (row["text"].lower().encode("utf-16-be"), row["pair"]),
    }
    with opened(report) as page:
        for name, key in orders.items():
            page.select_option("#sort", name)
            wanted = [row["pair"] for row in sorted(rows, key=key)]
            assert numbers(page) == wanted[:60], name
            page.locator("[aria-label='Next page']").first.click()
            assert numbers(page) == wanted[60:], name


@pytest.mark.long
def test_the_detail_view_by_keyboard(opened: Any, report: Path) -> None:
    with opened(report) as page:
        page.locator("[data-pair='12']").focus()
        page.keyboard.press("Enter")
        assert page.locator("#detail").is_visible()
        assert page.locator("#detail-caption").inner_text() == CAPTIONS[12]
        assert page.locator("#detail .near img").count() == 3
        assert "00000/k0 (2 captions)" in page.locator("#detail .members").inner_text()
        assert page.evaluate("document.activeElement.id") == "close"
        page.keyboard.press("ArrowRight")
        assert page.locator("#detail-caption").inner_text() == CAPTIONS[13]
        page.keyboard.press("Escape")
        assert page.locator("#detail").is_hidden()
        # the browser first gives the focus back to where it was, then tells that the dialog closed
        until(lambda: page.evaluate("document.activeElement.dataset.pair") == "13")
        page.keyboard.press("Space")
        page.keyboard.press("Enter")  # on the button that closes it
        assert page.locator("#detail").is_hidden()


@pytest.mark.long
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_phone_needs_no_sideways_scrolling(
    opened: Any, name: str, request: pytest.FixtureRequest
) -> None:
    with opened(request.getfixturevalue(name), width=390) as page:
        scroll_through(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        wide = "charts => charts.filter(chart => chart.getBoundingClientRect().right > 390).length"
        assert page.eval_on_selector_all(".chart .main-svg", wide) == 0
        if name == "report":
            page.locator("[data-pair='5']").click()
            assert page.evaluate("document.getElementById('detail').scrollWidth") <= 390


@pytest.mark.long
def test_the_dark_scheme(opened: Any, report: Path) -> None:
    with opened(report, scheme="dark") as page:
        scroll_through(page)
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", body)[:3])) < 120
        ink = "getComputedStyle(document.querySelector('.chart .xtick text')).fill"
        assert sum(map(int, re.findall(r"\d+", page.evaluate(ink))[:3])) > 500
        page.emulate_media(color_scheme="light")
        until(lambda: sum(map(int, re.findall(r"\d+", page.evaluate(ink))[:3])) < 250)


@pytest.mark.long
def test_the_comparison(opened: Any, comparison: Path) -> None:
    with opened(comparison) as page:
        scroll_through(page)
        assert page.locator("#results tbody tr").count() == 3
        assert page.locator(".strip .image").count() == 8
        page.select_option("#counts", "9")
        assert page.locator("#results tbody tr").count() == 1
        page.select_option("#counts", str(PAIRS))
        page.select_option("#backbone", "1")
        assert page.locator("#results tbody th").all_text_contents() == [HOSTILE[1], "pds"]
        scroll_through(page)
        no_harm(page)


@pytest.mark.long
def test_a_thousand_pairs_open_soon(opened: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", pairs=1_000, rows=(700, 700), side=224)
    path = Path(write_report(str(made.path)))
    began = time.perf_counter()
    with opened(path) as page:
        page.wait_for_selector(".card")
        page.fill("#search", "number 7")
        until(lambda: " of 1,000" in page.locator("#found").inner_text())
        took = time.perf_counter() - began
        print(f"\n1,000 pairs: {path.stat().st_size / 1e6:.1f} MB, interactive after {took:.2f} s")
        assert took < OPENS_WITHIN_S
        page.fill("#search", "")
        assert len(numbers(page)) == 60
        scroll_through(page)
