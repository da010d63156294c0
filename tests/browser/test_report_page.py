"""The report in a real browser: silent, without network, sortable, filterable, and readable on a phone.

Needs Playwright (extra ``browser``) and a Chromium, from ``BENCH_CHROMIUM`` or where Debian puts it; skipped without.
``BENCH_SCREENSHOTS=FOLDER`` keeps the screenshots.
"""

import os
from pathlib import Path

import pytest
from run_folders import write_run

from reports.report import write_leaderboard, write_report

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = '<script>document.title = "owned"</script>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report and a leaderboard on runs of two defences, one of them failed, one hostile."""
    base = tmp_path_factory.mktemp("pages")
    runs = base / "runs"
    write_run(runs / "a", strength=True)
    write_run(runs / "b", attack="linear", ssim=(0.9,) * 8)
    write_run(runs / "c", attack="linkage", linkage=True)
    write_run(runs / "d", defense="blur", ssim=(0.8,) * 8)
    write_run(runs / "e", defense="blur", attack="linear", error="out of memory")
    write_run(runs / "f", defense=HOSTILE, attack=HOSTILE, ssim=(0.6,) * 8)
    write_report([runs], base)
    write_leaderboard(runs, base)
    return base


@pytest.fixture
def visit(browser, folder):
    """Open a page; at the end of the test it must have been silent and have asked nobody for anything."""
    heard, contexts = [], []

    def call(name="report.html", viewport=DESKTOP, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(str(error)))
        address = (folder / name).as_uri()
        page.on("request", lambda request: None if request.url == address else heard.append(request.url))
        page.goto(address)
        return page

    yield call
    for context in contexts:
        context.close()
    assert [line for line in heard if not line.startswith("data:")] == []


def column(page, name):
    """The shown texts of one column of the summary, first lines only."""
    return page.evaluate(
        """name => {
            const table = document.getElementById("summary-1");
            const place = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.startsWith(name));
            return [...table.tBodies[0].rows].filter(row => !row.hidden)
                .map(row => row.cells[place].firstChild.textContent.trim());
        }""",
        name,
    )


def heading(page, name):
    return page.locator("#summary-1 thead th", has_text=name).first


@pytest.mark.parametrize("name", ["report.html", "leaderboard.html"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(visit, name, viewport, scheme):
    page = visit(name, viewport, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    # Folded parts have to fit, too.
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.title() != "owned"
    picture = page.screenshot(full_page=True)
    if folder := os.environ.get("BENCH_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{Path(name).stem}-{viewport['width']}-{scheme}.png").write_bytes(picture)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_background(visit, scheme):
    page = visit(color_scheme=scheme)
    colours = page.evaluate(
        """() => {
            const style = getComputedStyle(document.body), probe = document.createElement("span");
            document.body.append(probe);
            const series = [1, 2, 3, 4, 5, 6, 7, 8].map(number => `series-${number}`);
            const names = ["ink", "muted", "accent", "warn", "bad", ...series];
            return [style.backgroundColor, ...names.map(name => {
                probe.style.color = `var(--${name})`;
                return getComputedStyle(probe).color;
            })];
        }"""
    )

    def luminance(colour):
        levels = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        return sum(weight * level for weight, level in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    paper, *inks = map(luminance, colours)
    for ink in inks:  # WCAG 2.2, success criterion 1.4.3
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5


def test_sorting_by_numbers_both_ways_and_what_is_missing_stays_last(visit):
    page = visit()
    for state in ("ascending", "descending"):
        heading(page, "SSIM").locator("button").click()
        assert heading(page, "SSIM").get_attribute("aria-sort") == state
        shown = column(page, "SSIM")
        numbers = [float(text) for text in shown if text != "–"]
        assert numbers == sorted(numbers, reverse=state == "descending")
        assert len(numbers) > 4
        assert shown[: len(numbers)] == [text for text in shown if text != "–"]
    heading(page, "defence").locator("button").click()
    assert heading(page, "SSIM").get_attribute("aria-sort") is None
    assert column(page, "defence") == sorted(column(page, "defence"), key=str.lower)


def test_sorting_by_keyboard(visit):
    page = visit()
    button = heading(page, "PSNR").locator("button")
    button.focus()
    page.keyboard.press("Enter")
    assert heading(page, "PSNR").get_attribute("aria-sort") == "ascending"
    assert button.evaluate(
        "button => document.activeElement === button && getComputedStyle(button).outlineStyle !== 'none'"
    )


def test_filters(visit):
    page = visit()
    every = len(column(page, "defence"))
    form = page.locator("form.filters")
    form.get_by_label("defence").select_option("blur")
    assert set(column(page, "defence")) == {"blur"}
    form.get_by_label("rows").select_option("failed")
    assert column(page, "attack") == ["linear"]
    assert form.locator("output").inner_text() == f"1 of {every} rows"
    form.get_by_label("defence").select_option("")
    form.get_by_label("rows").select_option("")
    form.get_by_label("search").fill("LINKAGE")
    assert 0 < len(column(page, "defence")) < every
    form.get_by_label("search").fill("")
    assert len(column(page, "defence")) == every
    form.get_by_label("search").fill("<script>")
    assert set(column(page, "defence")) == {HOSTILE}


def test_pictures_are_enlarged_by_keyboard(visit):
    page = visit()
    first = page.locator("button.zoom").first
    first.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog#zoom")
    assert dialog.is_visible()
    small, large = first.locator("img"), dialog.locator("img")
    assert large.get_attribute("alt") == small.get_attribute("alt") != ""
    assert large.bounding_box()["width"] > 3 * small.bounding_box()["width"]
    page.keyboard.press("ArrowRight")
    second = page.locator("button.zoom").nth(1)
    assert large.get_attribute("src") == second.locator("img").get_attribute("src")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert second.evaluate("button => document.activeElement === button")


def test_pictures_are_enlarged_by_mouse_and_closed_beside(visit):
    page = visit(viewport=PHONE)
    page.locator("button.zoom").first.click()
    dialog = page.locator("dialog#zoom")
    box = dialog.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]
    dialog.get_by_label("close").click()
    assert not dialog.is_visible()


def test_everything_is_there_without_scripts(visit):
    page = visit(java_script_enabled=False)
    assert not page.locator("form.filters").is_visible()
    assert page.locator("#summary-1 tbody tr").count() > 5
    assert page.locator("#summary-1 thead th").first.inner_text() == "defence"


def test_a_script_that_is_not_its_own_does_not_run(browser, folder):
    """The last line: even markup that got through is not executed."""
    page = browser.new_page()
    heard = []
    page.on("console", lambda message: heard.append(message.text))
    document = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "injected.html").write_text(document.replace("</main>", f"{HOSTILE}</main>"), encoding="utf-8")
    page.goto((folder / "injected.html").as_uri())
    assert page.title() != "owned"
    assert any("Content Security Policy" in line for line in heard)
    page.close()


def test_printing_shows_whole_tables(visit):
    page = visit()
    page.emulate_media(media="print")
    assert page.locator(".scroll").first.evaluate("part => getComputedStyle(part).overflowX") == "visible"
    assert not page.locator("form.filters").first.is_visible()
