"""The four formats of a report: complete, self-contained, and inert whatever a run is called."""

import csv
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image
from run_folders import inversion, template_protection, write_run

from bench.errors import MissingError
from bench.run.archive import load_runs
from reports.cells import settings
from reports.formats import csv_text as text
from reports.formats import markdown_text as markdown
from reports.formats import report_latex, table_latex
from reports.papers import filled
from reports.published import paper_tables
from reports.report import write_leaderboard, write_report

TEX = shutil.which("pdflatex")
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=HYPERLINK(1)",
    "@SUM(1)",
    "a|b`c`*d*",
    "\\input{x}$&%#_^~",
    "{{ 7 * 7 }}",
    "[x](javascript:alert(1))",
    "_hidden $\\frac$",
    "\t=1",
    "+1",
    "-1",
    "a\x00b\x0bc\r\n=1",
]
#: What makes a spreadsheet take a cell for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: Commands that a table is made of, and those that stand for characters.
LATEX = {
    "begin", "end", "centering", "small", "scriptsize", "caption", "toprule", "midrule", "bottomrule", "ldots",
    "textbf",
    "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar", "textquotedbl",
    "textasciigrave", "textquotesingle",
    "raggedright", "arraybackslash", "resizebox", "ifdim", "width", "textwidth", "else", "fi",
}  # fmt: skip


class Elements(HTMLParser):
    """Every start tag of a document, with its attributes."""

    def __init__(self, document):
        super().__init__()
        self.elements = []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def report(tmp_path, *folders, **options):
    files = write_report(list(folders), tmp_path / "out", **options).files
    assert [file.name for file in files] == ["report.html", "report.md", "report.tex", "measures.csv"]
    return [file.read_text(encoding="utf-8") for file in files]


def test_every_run_is_in_every_format(tmp_path):
    folders = [
        write_run(tmp_path / "a", strength=True), write_run(tmp_path / "b", attack="linkage", linkage=True),
        write_run(tmp_path / "c", attack="linear", error="out of memory"),
    ]  # fmt: skip
    page, md, tex, table = report(tmp_path, *folders)
    for document in (page, md):
        for part in ("unet (whitebox)", "linkage", "out of memory", "failed", "synthetic faces", "floor: mean face"):
            assert part in document, part
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == tex.count(r"\end{table*}") > 0
    rows = list(csv.DictReader(io.StringIO(table)))
    ssim = next(row for row in rows if row["figure"] == "recovery.ssim")
    assert (float(ssim["value"]), float(ssim["low"]), ssim["attack"]) == (0.7, 0.69, "unet")
    assert {row["figure"] for row in rows} >= {
        "utility.unprotected.accuracy", "recovery.floors.mean_face.ssim", "recovery.ceiling.ssim", "bytes_per_face",
        "linkage.protected_plain.accuracy", "recovery.identity.cosine", "strength.points.0.values.ssim",
    }  # fmt: skip
    (lost,) = (row for row in rows if row["status"] == "error")
    assert (lost["reason"], lost["value"]) == ("out of memory", "")


def test_each_of_several_attacks_has_its_row(tmp_path):
    several = write_run(tmp_path / "a", attack="linear,unet", strength=True)
    page, md, _, table = report(tmp_path, several, write_run(tmp_path / "b", attack="linkage", linkage=True))
    assert "2 runs of 1 defence" in page
    for row in ("linear (whitebox) on partialface", "unet (whitebox) on partialface"):
        assert row in page
        assert row in md
    assert "linear, unet (whitebox) on partialface (synthetic faces)" in page  # one sheet of the run
    assert "The same victims under every attack on partialface" in page
    assert page.count("State confusion") >= 2
    ssim = [row for row in csv.DictReader(io.StringIO(table)) if row["figure"] == "recovery.ssim"]
    assert [row["attack"] for row in ssim] == ["linear", "unet"]


def test_template_defences_are_in_every_format(tmp_path):
    folder = write_run(tmp_path / "a", defense="biohash", template=template_protection(), inversion=inversion(0.6))
    page, md, tex, table = report(tmp_path, folder, write_run(tmp_path / "b"))
    assert page.count('<table id="templates-1"') == 1
    assert 'id="templates-drawn-1-title"' in page
    for document in (page, md, tex):
        assert "1 template, with keys" in document
        assert "42.4" in document or document is tex  # LaTeX has no room for notes
    assert {"ISO/IEC 24745", "ISO/IEC 30136"} <= set(re.findall(r"<dt>(ISO[^<]+)</dt>", page))
    figures = {row["figure"]: float(row["value"]) for row in csv.DictReader(io.StringIO(table)) if row["value"]}
    assert figures["template.verification.stolen.accuracy"] == 0.85
    assert figures["template.replay_far_1e2"] == 0.011
    assert figures["inversion.same_far_1e2"] == 0.6
    assert figures["inversion.floor"] == 0.13


def test_the_leaderboard_has_what_inverted_templates_give_away(tmp_path):
    write_run(tmp_path / "runs" / "a", defense="biohash", template=template_protection(), inversion=inversion(0.6))
    page, md, table = (file.read_text() for file in write_leaderboard(tmp_path / "runs", tmp_path / "board").files[:3])
    worst = {row["figure"]: row for row in csv.DictReader(io.StringIO(table))}
    assert [float(worst[name]["value"]) for name in ("pass_same", "pass_renewed")] == pytest.approx([0.6, 0.55])
    assert float(worst["embedding_cosine"]["floor"]) == 0.13
    assert all("pass renewed, %" in document for document in (page, md))


def test_the_page_loads_nothing(tmp_path):
    page, *_ = report(tmp_path, write_run(tmp_path / "a"))
    for tag, attributes in Elements(page).elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
            value = attributes.get(name) or ""
            outside = value.startswith(("http:", "https:", "//"))
            assert not outside or tag == "a", (tag, attributes)
    assert "url(http" not in page
    assert "@import" not in page


def test_the_page_can_be_read_without_seeing_it(tmp_path):
    page, *_ = report(tmp_path, write_run(tmp_path / "a"))
    elements = Elements(page).elements
    assert ("html", {"lang": "en"}) in elements
    pictures = [attributes for tag, attributes in elements if tag == "img"][:-1]  # the last is the empty dialog's
    assert pictures
    assert all("synthetic face" in attributes["alt"] for attributes in pictures)
    assert page.count("<table") == page.count("<caption")
    assert all("scope" in attributes for tag, attributes in elements if tag == "th")
    assert len([1 for tag, _ in elements if tag == "main"]) == 1


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory):
    """A report on runs in which every name, and every error, is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, name in enumerate(HOSTILE):
        write_run(folder / f"{number}", defense=name, attack=name, knowledge=name, details={"kept_channels": [1]})
        write_run(folder / f"{number}-lost", defense=name, error=name, options={name: name})
    return report(folder, *(folder / name for name in sorted(path.name for path in folder.iterdir())))


def test_hostile_names_are_text_on_the_page(hostile_report):
    page = hostile_report[0]
    elements = Elements(page).elements
    assert len([1 for tag, _ in elements if tag == "script"]) == 1
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    assert all((attributes.get("src") or "data:").startswith("data:") for tag, attributes in elements if tag == "img")
    links = [attributes["href"] for tag, attributes in elements if tag == "a"]
    assert all(link.startswith(("#", "https://arxiv.org/")) for link in links)
    assert "{{ 7 * 7 }}" in page


def test_hostile_names_are_no_formulas(hostile_report):
    rows = list(csv.DictReader(io.StringIO(hostile_report[3])))
    names = {row["defense"] for row in rows} | {row["attack"] for row in rows}
    assert not [name for name in names if name.startswith(FORMULA)]
    assert {row["reason"] for row in rows if row["status"] == "error"} >= {"'=HYPERLINK(1)", "'\t=1", "a|b`c`*d*"}
    assert {"'=HYPERLINK(1)", "'@SUM(1)", "'+1", "'-1"} <= names


@pytest.mark.parametrize(
    ("value", "cell"),
    [("=1", "'=1"), ("  =1", "'  =1"), ("\t1", "'\t1"), ("-0.5", "'-0.5"), ("unet", "unet"), (None, ""), (3, "3")],
)
def test_cells_of_text(value, cell):
    assert text(value) == cell


def test_negative_figures_stay_numbers(tmp_path):
    *_, table = report(tmp_path, write_run(tmp_path / "a", cosine=-0.25))
    values = [row["value"] for row in csv.DictReader(io.StringIO(table)) if row["figure"] == "recovery.identity.cosine"]
    assert values == ["-0.25"]


def test_hostile_names_are_text_in_markdown(hostile_report):
    md = hostile_report[1]
    assert not re.search(r"<[a-zA-Z/!]", md)
    assert "](" not in md.replace("\\](", "")
    lines = md.splitlines()
    for start in [place for place, line in enumerate(lines) if line.startswith("|---")]:
        columns = lines[start].count("|")
        rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
        assert {row.count("|") for row in rows} == {columns}


@pytest.mark.parametrize(
    ("name", "literal"),
    [
        ("a|b\nc", "a&#124;b c"),
        ("[x](http://y)", "\\[x\\](http&#58;//y)"),
        ("`*_<b>&", "\\`\\*\\_&lt;b&gt;&amp;"),
        ("\\|", "\\\\&#124;"),
    ],
)
def test_markdown_escapes(name, literal):
    assert markdown(name) == literal


def test_hostile_names_are_text_in_latex(hostile_report):
    lines = [line for line in hostile_report[2].splitlines() if not line.startswith("% ")]
    body = re.sub(r"\\[\\{}$&%#_]", "", "\n".join(lines))
    assert body.count("{") == body.count("}")
    assert not set("%#_^~") & set(body)
    assert set(re.findall(r"\\([a-z]+)", body)) <= LATEX


@pytest.mark.skipif(TEX is None, reason="no pdflatex: apt-get install texlive-latex-base texlive-latex-recommended")
def test_tex_accepts_reports_and_tables(tmp_path):
    folders = [write_run(tmp_path / f"{n}", defense=name, attack=name) for n, name in enumerate(HOSTILE)]
    folders += [write_run(tmp_path / "greek", defense="Ωμέγα ε ↘", options={"naïve": "ß"}), write_run(tmp_path / "p")]
    runs = settings(load_runs(folders))
    (tmp_path / "report.tex").write_text(report_latex(runs), encoding="utf-8")
    (tmp_path / "table.tex").write_text(
        table_latex(filled(paper_tables()["paper-partialface"], runs)), encoding="utf-8"
    )
    needs = ["array", "booktabs", "graphicx", "textcomp"]
    head = [
        r"\documentclass[twocolumn]{article}",
        r"\usepackage[T1]{fontenc}",
        *(rf"\usepackage{{{n}}}" for n in needs),
    ]
    body = [r"\begin{document}", r"\input{table}", r"\clearpage", r"\input{report}", r"\end{document}"]
    (tmp_path / "main.tex").write_text("\n".join(head + body))
    command = [TEX, "-draftmode", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    log = done.stdout.decode("utf-8", errors="replace")
    assert done.returncode == 0, log[-2000:]
    # What is wider than the page was shrunk: only words that cannot be broken stick out of their column, a little.
    assert all(float(points) < 60 for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log))


def test_real_faces_are_shown_on_request_only(tmp_path):
    folder = write_run(tmp_path / "a", synthetic=False)
    page, *_ = report(tmp_path, folder)
    assert "data:image/png" not in page
    assert "--embed-faces" in page
    page, *_ = report(tmp_path, folder, embed_faces=True)
    assert "data:image/png" in page
    assert "synthetic" not in page.partition('id="reading"')[0].partition("<main")[2]


def test_no_images_leaves_every_face_out(tmp_path):
    page, *_ = report(tmp_path, write_run(tmp_path / "a"), images=False, embed_faces=True)
    assert "data:image/png" not in page
    assert "--no-images" in page


def test_sheets_show_extremes_and_the_same_victims_side_by_side(tmp_path):
    page, *_ = report(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", attack="linear"))
    assert page.count("worst victim <") == page.count("best victim <") == 2
    assert page.count("The same victims under every attack on partialface (synthetic faces)</caption>") == 1
    assert "SSIM 0.70, cosine 0.50" in page


def test_a_ready_sheet_is_shown_where_there_is_nothing_else(tmp_path):
    folder = write_run(tmp_path / "a", samples=False)
    (folder / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "samples" / "contact-sheet.png")
    page, *_ = report(tmp_path, folder)
    assert page.count("data:image/png") == 1
    assert "Contact sheet of unet (whitebox) on partialface" in page


def test_what_claims_to_be_a_picture_must_be_one(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "samples" / "victim-0-0.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(MissingError, match="not a PNG"):
        report(tmp_path, folder)
    assert not (tmp_path / "out").exists()


def test_where_things_are_kept_stays_private(tmp_path):
    page, md, tex, table = report(tmp_path, write_run(tmp_path / "a"))
    for document in (page, md, tex, table):
        assert "/home/somebody" not in document
        assert "person-" not in document


def test_a_report_is_the_same_each_time(tmp_path):
    folder = write_run(tmp_path / "a", strength=True)
    assert report(tmp_path, folder) == report(tmp_path, folder)


def test_leaderboard(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "a", ssim=(0.5,) * 8)
    write_run(runs / "b", attack="linear", ssim=(0.9,) * 8, cosine=0.1)
    write_run(runs / "c", protocol="1", defense="blur")
    write_run(runs / "d", defense="noise", error="broke")
    files = write_leaderboard(runs, tmp_path / "board").files
    tables, figures = files[:3], files[3:]
    assert [file.name for file in tables] == ["leaderboard.html", "leaderboard.md", "leaderboard.csv"]
    names = (f"utility-{figure}-{number}.svg" for figure in ("ssim", "type2-tar") for number in (1, 2))
    assert {file.name for file in figures} == set(names)
    page, md, table = (file.read_text(encoding="utf-8") for file in tables)
    rows = list(csv.DictReader(io.StringIO(table)))
    assert {(row["protocol"], row["defense"]) for row in rows} == {("2", "partialface"), ("2", "noise"), ("1", "blur")}
    worst = {row["figure"]: row for row in rows if row["defense"] == "partialface"}
    assert (float(worst["ssim"]["value"]), worst["ssim"]["strongest"]) == (0.9, "linear (whitebox) on partialface")
    assert worst["type1_tar"]["strongest"] == "unet (whitebox) on partialface"
    assert next(row["figure"] for row in rows if row["defense"] == "noise") == "failed"
    assert len(re.findall(r'<table id="board-\d"', page)) == 2
    assert "published: ICCV 2023" in md
    assert "floor: mean face" in md
    for figure in figures:  # each stands alone, with the colours that it uses
        drawn = figure.read_text(encoding="utf-8")
        assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
        used = set(re.findall(r"var\((--[\w-]+)\)", drawn))
        assert used
        assert all(f"{name}: #" in drawn for name in used)
    for document in (page, md):
        assert "protocol 1" in document
        assert "protocol 2" in document
        assert "broke" in document


# -- the commands ------------------------------------------------------------------------------------


def test_report_prints_its_files(bench, tmp_path):
    folder = write_run(tmp_path / "run")
    code, out, err = bench("report", folder, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    files = json.loads(out)["files"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        file.rpartition("/")[2] for file in files
    )
    assert len(files) == 4


def test_leaderboard_writes_beside_the_runs(bench, tmp_path):
    write_run(tmp_path / "runs" / "a")
    code, out, _ = bench("leaderboard", tmp_path / "runs")
    assert code == 0
    written = [f"leaderboard.{kind}" for kind in ("html", "md", "csv")]
    written += [f"utility-{figure}-1.svg" for figure in ("type2-tar", "ssim")]
    verdict, *files = out.splitlines()
    assert files == [str(tmp_path / "runs" / name) for name in written]
    assert "partialface is not" in verdict
    assert bench("leaderboard", tmp_path / "runs")[0] == 0, "its own files are no runs"


@pytest.mark.parametrize("command", ["report", "leaderboard"])
def test_a_folder_without_runs_is_refused(bench, tmp_path, command):
    code, out, err = bench(command, tmp_path, "--out", tmp_path / "out")
    assert code == 5
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert f"{tmp_path} is not a run directory" in err
    assert not (tmp_path / "out").exists()


def test_faces_cannot_be_shown_and_left_out(bench, tmp_path):
    code, _, err = bench("report", tmp_path, "--out", tmp_path / "out", "--no-images", "--embed-faces")
    assert code == 2
    assert "contradict" in err
