"""The page over all runs: who may see it, what it shows, and that no damage in a folder takes it down."""

import json
import os
import re
from datetime import UTC, datetime, timedelta

import pytest
from gate_world import make_run
from run_folders import write_run

from bench.run.archive import load_run, read_samples

testclient = pytest.importorskip("starlette.testclient")
view = pytest.importorskip("reports.view")

TOKEN = "a-token"
LOCAL = "http://127.0.0.1:8000"


def client(folder, base=LOCAL):
    return testclient.TestClient(view.make_app(folder, TOKEN), base_url=base)


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder / "a", ssim=(0.71,) * 8)
    write_run(folder / "b", defense="blur", attack="linear", ssim=(0.83,) * 8)
    write_run(folder / "c", defense="blur", error="the disk is full")
    return folder


def under_way(folder, seconds_ago=0, **event):
    """A run of which nothing but the manifest and its events is there."""
    write_run(folder, samples=False)
    for name in ("metrics.json", "per_image.parquet", "scores.parquet", "state_inference.parquet"):
        (folder / name).unlink()
    manifest = json.loads((folder / "manifest.json").read_text()) | {"status": "started", "artefacts": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat(timespec="milliseconds")
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps({"time": said, "event": "progress", **event}) + "\n")
        events.write('{"time": "half a li')
    return folder


def rows(page):
    """The rows of the table of all runs: texts of their cells."""
    body = re.search(r'<table id="all".*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    return [
        [re.sub(r"<[^>]+>|\s+", " ", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    ]


# -- who may see it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/wrong/", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/", "//", "/wrong/run/a", "/é/"])
def test_without_the_token_nothing_is_told(store, path):
    answer = client(store).get(path)
    assert answer.status_code == 403
    assert "partialface" not in answer.text
    assert TOKEN not in answer.text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "192.168.0.7"])
def test_other_hosts_are_refused(store, host):
    """A name of elsewhere that was made to lead here is refused, token or not."""
    answer = client(store).get(f"/{TOKEN}/", headers={"Host": host})
    assert answer.status_code == 400
    assert "partialface" not in answer.text
    assert client(store, "http://localhost:8000").get(f"/{TOKEN}/").status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_it_only_reads(store, method):
    assert client(store).request(method, f"/{TOKEN}/").status_code == 405


@pytest.mark.parametrize(
    "name",
    ["..%2Fsecret", "%2e%2e%2fsecret", "../secret", "%2Fetc%2Fpasswd", "a%2F..%2F..%2Fsecret", "nowhere", "cache"],
)
def test_no_address_leads_out_of_the_folder(store, name):
    write_run(store.parent / "secret", defense="noise", samples=False)
    (store / "cache").mkdir()
    with client(store) as http:
        for path in (f"/{TOKEN}/run/{name}", f"/{TOKEN}/compare?a=a&b={name}"):
            answer = http.get(path)
            assert answer.status_code in (403, 404), path
            assert "noise" not in answer.text


def test_a_link_out_of_the_folder_is_not_followed(store):
    write_run(store.parent / "elsewhere", defense="pixelate", samples=False)
    (store / "link").symlink_to(store.parent / "elsewhere")
    page = client(store).get(f"/{TOKEN}/").text
    assert [row[0] for row in rows(page) if "pixelate" in row] == []
    assert "link leads out of" in page


def test_nothing_comes_from_elsewhere_and_nobody_may_frame_it(store):
    http = client(store)
    for path in ("", "run/a?faces=yes", "compare?a=a&b=b"):
        answer = http.get(f"/{TOKEN}/{path}")
        assert answer.status_code == 200
        assert not re.findall(
            r'(?:src|action)="(?:https?:)?//|<link[^>]+href="(?!data:)|@import|url\(http', answer.text
        )
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in answer.text


# -- what it shows -----------------------------------------------------------------------------------


def test_every_attack_of_every_run_has_a_row(store):
    write_run(store / "d", defense="noise", attack="unet,linear", samples=False)
    page = client(store).get(f"/{TOKEN}/").text
    found = {(row[0], row[1], row[2], row[3], row[4].partition(" ")[0]) for row in rows(page)}
    assert found == {
        ("a", "partialface", "unet", "whitebox", "success"),
        ("b", "blur", "linear", "whitebox", "success"),
        ("c", "blur", "unet", "whitebox", "error"),
        ("d", "noise", "unet", "whitebox", "success"),
        ("d", "noise", "linear", "whitebox", "success"),
    }
    assert any("the disk is full" in cell for row in rows(page) for cell in row)
    assert any("0.71" in cell for row in rows(page) if row[0] == "a" for cell in row)
    for name in ("defence", "attack", "knowledge", "status"):
        assert f'<select name="{name}">' in page


def test_faces_are_shown_only_on_request(store):
    write_run(store / "real", synthetic=False)
    http = client(store)
    page = http.get(f"/{TOKEN}/run/real").text
    assert "data:image/png" not in page
    [link] = re.findall(r'href="(\?[^"]*)">Show faces', page)
    pictures = set(re.findall(r'src="(data:image/png[^"]+)"', http.get(f"/{TOKEN}/run/real{link}").text))
    kept = {name for victim in read_samples(store / "real" / "samples").victims for name in victim.files.values()}
    assert len(pictures) == len(kept)


def test_one_run_has_its_curves(store):
    page = client(store).get(f"/{TOKEN}/run/a").text
    for title in ("ROC of recognition", "DET of recognition", "Training of the recognisers", "Fit of"):
        assert title in page


def test_two_runs_side_by_side(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", defense="blur", shift={"ssim": 0.1})
    make_run(tmp_path / "c", status="error")
    http = client(tmp_path)
    page = http.get(f"/{TOKEN}/compare?a=a&b=b").text
    changes = re.search(r'<table id="changes".*?</table>', page, re.DOTALL)[0]
    [row] = re.findall(r"<tr[^>]*>\s*<th[^>]*>recovery\.ssim</th>.*?</tr>", changes, re.DOTALL)
    first, second, change = (float(number) for number in re.findall(r'data-sort="([-\d.e]+)"', row))
    assert first == pytest.approx(load_run(tmp_path / "a").result.recovery.ssim.value)
    assert second - first == pytest.approx(change) == pytest.approx(0.1, abs=0.01)
    differing = re.search(r'<table id="differing".*?</table>', page, re.DOTALL)[0]
    assert "partialface" in differing
    assert "blur" in differing
    failed = http.get(f"/{TOKEN}/compare?a=a&b=c")
    assert failed.status_code == 200
    assert "failed (disk full)" in failed.text


# -- runs under way ----------------------------------------------------------------------------------


def test_a_run_under_way_tells_how_far_it_is(store):
    under_way(store / "z", task="train attack", done=25, total=100, loss=0.125)
    http = client(store)
    page = http.get(f"/{TOKEN}/").text
    assert '<progress value="25.0" max="100.0"' in page
    assert "loss 0.125" in page
    assert "last heard of" in page
    assert [row[4] for row in rows(page) if row[0] == "z"] == ["started"]
    one = http.get(f"/{TOKEN}/run/z").text
    assert "Training of the recognisers" in one.split("data-ends")[1].partition("Before you quote")[0]


@pytest.mark.parametrize("seconds_ago", [3600, -3600], ids=["an hour ago", "the clock was set back"])
def test_a_run_that_has_long_been_silent_is_said_to_be(store, seconds_ago):
    under_way(store / "z", seconds_ago=seconds_ago, task="train attack", done=25, total=100)
    assert "silent since" in client(store).get(f"/{TOKEN}/").text


def test_what_has_not_changed_is_not_sent_again(store):
    folder = under_way(store / "z", task="train attack", done=25, total=100)
    http = client(store)
    for _ in range(2):  # the clock may have moved on to the next minute
        first = http.get(f"/{TOKEN}/")
        again = http.get(f"/{TOKEN}/", headers={"If-None-Match": first.headers["etag"]})
        if again.status_code == 304:
            break
    assert again.status_code == 304
    assert again.text == ""
    with (folder / "events.jsonl").open("a") as events:
        events.write(
            'ne"}\n' + json.dumps({"event": "progress", "task": "train attack", "done": 50, "total": 100}) + "\n"
        )
    changed = http.get(f"/{TOKEN}/", headers={"If-None-Match": first.headers["etag"]})
    assert changed.status_code == 200
    assert '<progress value="50.0"' in changed.text


def test_runs_come_and_go(tmp_path):
    (tmp_path / "runs").mkdir()
    http = client(tmp_path / "runs")
    assert "No run yet" in http.get(f"/{TOKEN}/").text
    write_run(tmp_path / "runs" / "a", samples=False)
    assert [row[0] for row in rows(http.get(f"/{TOKEN}/").text)] == ["a"]
    (tmp_path / "runs" / "a").rename(tmp_path / "gone")
    assert http.get(f"/{TOKEN}/run/a").status_code == 404


# -- damage ------------------------------------------------------------------------------------------

DAMAGE = {
    "manifest is no JSON": lambda run: (run / "manifest.json").write_text("{"),
    "manifest is binary": lambda run: (run / "manifest.json").write_bytes(os.urandom(64)),
    "manifest is a list": lambda run: (run / "manifest.json").write_text("[]"),
    "seed is a word": lambda run: altered(run, seed="zero"),
    "options are no table": lambda run: altered(run, attack_options=[1, 2]),
    "metrics are gone": lambda run: (run / "metrics.json").unlink(),
    "metrics are cut": lambda run: (run / "metrics.json").write_text("{" * 9999),
    "scores are no table": lambda run: (run / "scores.parquet").write_bytes(b"PAR1"),
    "events are binary": lambda run: (run / "events.jsonl").write_bytes(b"\xff\xfe\n\x00\n"),
    "samples lead out": lambda run: sampled(run, "../../../../etc/passwd"),
    "a folder in place of a file": lambda run: ((run / "metrics.json").unlink(), (run / "metrics.json").mkdir()),
}


def altered(run, **config):
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"] |= config
    (run / "manifest.json").write_text(json.dumps(manifest))


def sampled(run, name):
    index = json.loads((run / "samples" / "samples.json").read_text())
    index["victims"][0]["files"]["original"] = name
    (run / "samples" / "samples.json").write_text(json.dumps(index))


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_is_a_line_and_the_others_are_shown(tmp_path, what):
    write_run(tmp_path / "good", samples=False)
    DAMAGE[what](write_run(tmp_path / "bad"))
    http = client(tmp_path)
    page = http.get(f"/{TOKEN}/")
    assert page.status_code == 200
    assert [row[0] for row in rows(page.text)] == ["good"]
    assert re.search(r"<strong>damaged:</strong> bad: .+</p>", page.text)
    for path in ("run/bad", "run/bad?faces=yes", "compare?a=good&b=bad"):
        answer = http.get(f"/{TOKEN}/{path}")
        assert answer.status_code == 500
        assert "This cannot be shown" in answer.text


def test_what_somebody_wrote_into_a_run_is_text(tmp_path):
    hostile = "<script>alert(1)</script>"
    write_run(tmp_path / 'run "><b>', defense=hostile, error=hostile, samples=False)
    http = client(tmp_path)
    page = http.get(f"/{TOKEN}/").text
    assert hostile not in page
    [link] = re.findall(r'<a href="(run/[^"]+)"', page)
    assert http.get(f"/{TOKEN}/{link}").status_code == 200
    assert load_run(tmp_path / 'run "><b>').failed
