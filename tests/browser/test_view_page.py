"""`bench view` in a real browser: a run under way goes on by itself, and what was chosen stays.

Needs what the report's tests need, and the extra ``view``; skipped without.
"""

import json
import os
import shutil
import threading
from datetime import UTC, datetime

import pytest
from run_folders import write_run

sync_api = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")
view = pytest.importorskip("reports.view")


@pytest.fixture
def address(tmp_path):
    """A folder of two finished runs and one under way, served; `done` of it is written by the test."""
    server = uvicorn.Server(uvicorn.Config(view.make_app(tmp_path, "token"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/token/"
    server.should_exit = True
    thread.join()


def goes_on(run, done):
    event = {"time": datetime.now(UTC).isoformat(), "task": "train attack", "done": done, "total": 100}
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps(event) + "\n")


def test_a_run_goes_on_while_one_looks(tmp_path, address, browser):
    write_run(tmp_path / "a", ssim=(0.71,) * 8)
    write_run(tmp_path / "b", defense="blur", ssim=(0.83,) * 8)
    run = write_run(tmp_path / "z", defense="noise", samples=False)
    result = (run / "metrics.json").read_text()
    (run / "metrics.json").unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "started"}))
    goes_on(run, 10)
    page, heard = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(address) else heard.append(asked.url))
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("progress").get_attribute("value") == "10.0"
    page.select_option("select[name=defence]", "blur")
    assert page.locator("#all tbody tr:visible").count() == 1

    goes_on(run, 60)
    sync_api.expect(page.locator("progress")).to_have_attribute("value", "60.0", timeout=10_000)
    assert page.locator("#all tbody tr:visible").count() == 1
    assert page.locator("select[name=defence]").input_value() == "blur"
    (run / "metrics.json").write_text(result)
    (run / "manifest.json").write_text(json.dumps(manifest))
    sync_api.expect(page.locator("progress")).to_have_count(0, timeout=10_000)
    page.select_option("select[name=defence]", "")
    assert page.locator("#all tbody tr.measured:visible").count() == 3
    page.get_by_role("link", name="a", exact=True).click()
    assert page.locator("img[src^='data:image/png']").count() == 0
    page.get_by_role("link", name="Show faces").click()
    assert page.locator(".sheet img").count() > 0
    page.select_option("select[name=b]", "b")
    page.get_by_role("button", name="show both").click()
    assert "beside" in page.locator("h1").inner_text()
    if folder := os.environ.get("BENCH_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/view.png", full_page=True)
    page.close()
    assert [line for line in heard if not line.startswith("data:")] == []


#: The least contrast of shown text with what lies behind it (WCAG 2.2, 1.4.3), and the text.
CONTRAST = """() => {
    const rgb = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = part => {
        for (; part; part = part.parentElement) {
            const colour = rgb(getComputedStyle(part).backgroundColor);
            if (colour.length === 3) return colour;
        }
        return [255, 255, 255];
    };
    const told = [...document.querySelectorAll("body *")]
        .filter(part => part.offsetParent && [...part.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
        .map(part => [light(rgb(getComputedStyle(part).color)), light(behind(part)), part.innerText])
        .map(([ink, paper, text]) => [(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), text]);
    return told.reduce((least, one) => one[0] < least[0] ? one : least);
}"""


def test_hundreds_of_runs_by_day_and_by_night(tmp_path, address, browser):
    """Of four defences and fifty seeds; all told apart, filtered and sorted, without scrolling aside on a phone."""
    for defense in ("partialface", "blur", "noise", "pixelate"):
        first = write_run(tmp_path / f"{defense}-0", defense=defense, samples=False)
        manifest = json.loads((first / "manifest.json").read_text())
        for seed in range(1, 50):
            run = shutil.copytree(first, tmp_path / f"{defense}-{seed}")
            manifest["config"]["seed"], manifest["updated"] = seed, f"2026-01-01T00:{seed:02}:00+00:00"
            (run / "manifest.json").write_text(json.dumps(manifest))
    papers = {}
    for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 390)):
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        page.goto(address)
        rows = page.locator("#all tbody tr:visible")
        assert rows.count() == 200
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        least, text = page.evaluate(CONTRAST)
        assert least >= 4.5, text
        papers[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        if folder := os.environ.get("BENCH_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/view-{width}-{scheme}.png")
        page.select_option("select[name=defence]", "noise")
        assert rows.count() == 50
        page.get_by_label("search").fill("noise-4")
        assert rows.count() == 11
        page.close()
    assert papers["light"] != papers["dark"]
