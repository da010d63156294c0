"""The command line: output, exit codes, and one clear line for every bad input."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def one_line(stderr):
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("bench: ")
    assert "Traceback" not in stderr
    return lines[0]


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    path = tmp_path / "face.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        ("--help", {"torch", "numpy", "pandas"}),
        ("run --help", {"torch", "numpy", "pandas"}),
        ("sweep --help", {"torch", "ray", "numpy"}),
        ("list settings", {"torch", "pandas"}),
        ("list metrics", {"torch", "pandas"}),
        ("doctor", {"torch", "torchvision", "onnxruntime"}),
    ],
)
def test_what_only_prints_imports_nothing_heavy(words, heavy):
    code = f"import sys, bench.cli; sys.argv = ['bench', *{words.split()}]\n"
    code += f"try: bench.cli.main()\nexcept SystemExit: pass\nassert not {heavy} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_no_arguments_is_help(bench):
    code, out, err = bench()
    assert code == 2
    assert "Usage" in out + err


@pytest.mark.parametrize("kind", ["defenses", "attacks", "datasets", "backbones", "heads", "metrics", "settings"])
def test_list(bench, kind):
    code, out, _ = bench("list", kind, "--json")
    assert code == 0
    rows = json.loads(out)
    assert len({row["name"] for row in rows}) == len(rows) > 0
    code, out, _ = bench("list", kind)
    assert code == 0
    assert rows[0]["name"] in out


@pytest.mark.parametrize("kind", ["attack", "attacks"])
def test_what_one_attack_takes(bench, kind):
    code, out, _ = bench("list", kind, "unet", "--json")
    assert code == 0
    entry = json.loads(out)
    assert entry["kind"] == "recovery"
    assert entry["needs"] == ["mechanism", "public faces"]
    assert entry["budgets"][:2] == ["data", "k"]
    assert entry["presets"]["quick"]["images"] < entry["presets"]["paper"]["images"]
    images = next(option for option in entry["options"] if option["name"] == "images")
    assert (images["type"], images["range"], images["default"]) == ("int", ">= 1", 1_000_000)
    code, out, _ = bench("list", kind, "unet")
    assert re.search(r"^images +int +1000000 +>= 1", out, re.MULTILINE)


@pytest.mark.parametrize("kind", ["defence", "defenses", "Defence"])
def test_either_spelling(bench, kind):
    assert json.loads(bench("list", kind, "partialface", "--json")[1])["name"] == "partialface"


def test_what_cannot_be_listed(bench):
    code, _, err = bench("list", "atacks")
    assert (code, "did you mean 'attacks'" in one_line(err)) == (2, True)
    code, _, err = bench("list", "attack", "unnet")
    assert (code, "did you mean 'unet'" in one_line(err)) == (2, True)


def test_run_passes_its_flags_on(bench, monkeypatch):
    seen = []

    def look(config, console):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.run.pipeline.Pipeline", look)
    flags = ("--no-utility", "--budget", "k=1,2", "-a", "images=70", "-a", "unet.images=300", "--probes", "9")
    assert bench("run", "--defense", "none", "--attack", "unet,linear", *flags)[0] == 130
    assert (seen[0].attack, seen[0].utility, seen[0].budget, seen[0].probes) == ("unet,linear", False, "k=1,2", 9)
    assert seen[0].attack_options == {"images": "70", "unet": {"images": "300"}}
    bench("run", "--defense", "none", "--attack", "unet", "--head", "arcface", "--set", "training.epochs=3")
    assert (seen[1].training.head, seen[1].training.epochs) == ("arcface", 3)
    assert (seen[1].utility, seen[1].budget) == (True, None)


class TestProtect:
    def test_writes_what_a_client_would_send(self, bench, photo, tmp_path):
        out = tmp_path / "p.npz"
        code, stdout, _ = bench(
            "protect", photo, photo, "--defense", "partialface", "-o", "subset=2", "-o", "permutation=1", "--out", out
        )
        assert code == 0
        assert "2x27x112x112" in stdout
        with np.load(out) as file:
            assert file["representation"].shape == (2, 27, 112, 112)
            assert file["representation"].dtype == np.float32
            assert file["state"].tolist() == [[2, 1], [2, 1]]
            assert str(file["defense"]) == "partialface"
            assert json.loads(str(file["options"]))["subset"] == 2
            assert np.array_equal(file["representation"][0], file["representation"][1])
            assert 5 < np.abs(file["representation"]).max() < 2000  # coefficients, not normalised

    def test_the_seed_decides(self, bench, photo, tmp_path):
        states = []
        for seed in (1, 1, 2):
            out = tmp_path / f"{len(states)}.npz"
            assert bench("protect", *[photo] * 8, "--defense", "partialface", "--seed", seed, "--out", out)[0] == 0
            with np.load(out) as file:
                states.append(file["state"].tolist())
        assert states[0] == states[1] != states[2]

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
    def test_other_modes_and_sizes(self, bench, tmp_path, mode):
        path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
        if mode == "I;16":
            Image.fromarray(np.full((40, 60), 30000, dtype=np.uint16)).save(path)
        else:
            Image.new(mode, (60, 40)).save(path)
        code, out, _ = bench("protect", path, "--defense", "none", "--out", "p.npz", "--json")
        assert code == 0
        assert json.loads(out)["shape"] == [1, 3, 112, 112]

    @pytest.mark.parametrize(
        ("make", "code", "message"),
        [
            (lambda path: None, 5, "does not exist"),
            (lambda path: path.write_bytes(b"not an image"), 3, "face.png"),
            (lambda path: path.write_bytes(b""), 3, "face.png"),
        ],
    )
    def test_bad_images(self, bench, photo, make, code, message, tmp_path):
        photo.unlink()
        make(photo)
        got, _, err = bench("protect", photo, "--defense", "none", "--out", "p.npz")
        assert got == code
        assert message in one_line(err)
        assert not (tmp_path / "p.npz").exists()

    def test_truncated_image(self, bench, photo):
        photo.write_bytes(photo.read_bytes()[:-500])
        code, _, err = bench("protect", photo, "--defense", "none", "--out", "p.npz")
        assert code == 3
        assert "face.png" in one_line(err)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--defense", "partailface"), "did you mean 'partialface'"),
            (("--defense", "partialface", "-o", "colour=1"), "unknown key 'colour'"),
            (("--defense", "partialface", "-o", "subset=99"), "subset"),
            (("--defense", "partialface", "-o", "subset"), "write key=value"),
        ],
    )
    def test_bad_options(self, bench, photo, arguments, message):
        code, _, err = bench("protect", photo, *arguments, "--out", "p.npz")
        assert code == 2
        assert message in one_line(err)

    def test_out_must_be_npz(self, bench, photo):
        code, _, err = bench("protect", photo, "--defense", "none", "--out", "p.csv")
        assert code == 2
        assert ".npz" in one_line(err)


@pytest.fixture
def empty_pack(tmp_path):
    """An InsightFace folder without a verification pack."""
    folder = tmp_path / "faces"
    folder.mkdir()
    return folder


class TestBadRuns:
    RUN = ("run", "--defense", "partialface", "--attack", "unet", "--preset", "quick")

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("--preset", "fast"), 2, "preset"),
            (("--dataset", "casia"), 2, "unknown dataset 'casia'"),
            (("--knowledge", "all"), 2, "knowledge"),
            (("--dataset", "insightface"), 5, "--data-root"),
            (("--dataset", "folder", "--data-root", "nowhere"), 5, "nowhere"),
            (("--evaluator", "missing.onnx"), 5, "missing.onnx"),
            (("--config", "missing.toml"), 5, "missing.toml"),
            (("--set", "training.epoch=1"), 2, "training.epoch"),
            (("--set", "dataset_options.identities=0"), 2, "identities"),
            (("-a", "widths=a"), 2, "widths"),
            (("-a", "linear.rank=3"), 2, "unknown key 'linear'"),
            (("--budget", "k=2,1"), 2, "budget"),
            (("--budget", "epochs=1,2"), 2, "axes: data, k"),
            (("--image-size", "5"), 2, "image_size"),
            (("--device", "cuda:99"), 2, "device"),
        ],
    )
    def test_refused(self, bench, arguments, code, message):
        got, out, err = bench(*self.RUN, *arguments)
        assert got == code
        assert message in one_line(err)
        assert out == ""

    def test_json_is_one_document_even_then(self, bench):
        code, out, err = bench(*self.RUN, "--dataset", "casia", "--json")
        document = json.loads(out)
        assert document["status"] == "error"
        assert document["exit_code"] == code == 2
        assert "casia" in one_line(err)

    def test_missing_names(self, bench):
        code, _, err = bench("run", "--attack", "unet")
        assert code == 2
        assert "defense" in one_line(err)

    def test_an_unknown_environment_variable_is_a_warning(self, bench, monkeypatch, caplog):
        monkeypatch.setenv("BENCH_PRESETS", "quick")
        assert bench(*self.RUN, "--device", "nowhere")[0] == 2
        assert "BENCH_PRESETS (did you mean BENCH_PRESET?)" in caplog.text

    @pytest.mark.parametrize(
        "make",
        [
            lambda root: None,
            lambda root: (root / "stray.txt").write_text("x"),
            lambda root: (root / "someone").mkdir(),
        ],
    )
    def test_empty_folder(self, bench, empty_pack, make):
        make(empty_pack)
        code, _, err = bench(*self.RUN, "--dataset", "folder", "--data-root", empty_pack)
        assert code in (3, 5)
        assert str(empty_pack) in one_line(err) or "faces" in one_line(err)

    def test_identities_with_one_image_each(self, bench, empty_pack):
        for person in range(30):
            (empty_pack / f"p{person}").mkdir()
            Image.new("RGB", (32, 32), (person, 0, 0)).save(empty_pack / f"p{person}" / "1.png")
        code, _, err = bench(*self.RUN, "--dataset", "folder", "--data-root", empty_pack)
        assert code == 3
        one_line(err)

    def test_corrupt_rec(self, bench, empty_pack):
        (empty_pack / "train.rec").write_bytes(b"\x00" * 1000)
        (empty_pack / "train.idx").write_text("0\t0\n1\t500\n")
        (empty_pack / "property").write_text("1,112,112\n")
        _pack(empty_pack / "lfw.bin")
        code, _, err = bench(*self.RUN, "--dataset", "insightface", "--data-root", empty_pack)
        assert code == 3
        assert "train.rec" in one_line(err)

    def test_hostile_pickle_is_refused_and_not_run(self, bench, empty_pack, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "pwned",))

        (empty_pack / "lfw.bin").write_bytes(pickle.dumps(([Evil()], [True])))
        code, _, err = bench("data", "info", empty_pack / "lfw.bin")
        assert code == 3
        assert "lfw.bin" in one_line(err)
        assert not (tmp_path / "pwned").exists()

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
    def test_out_without_permission(self, bench, tmp_path):
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        code, _, err = bench(*self.RUN, "--out", locked / "runs")
        assert code == 2
        assert "locked" in one_line(err)

    def test_out_is_a_file(self, bench, photo):
        code, _, err = bench(*self.RUN, "--out", photo)
        assert code == 2
        assert "cannot be written" in one_line(err)

    def test_no_space_left(self, bench, monkeypatch, photo):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device", "p.npz")

        monkeypatch.setattr(np, "savez", full)
        code, _, err = bench("protect", photo, "--defense", "none", "--out", "p.npz")
        assert code == 3
        assert "no space left on the disk (p.npz)" in one_line(err)
        assert not Path("p.npz").exists()

    def test_interrupt(self, bench, monkeypatch):
        from bench.run.pipeline import Pipeline

        def interrupt(self):
            raise KeyboardInterrupt

        monkeypatch.setattr(Pipeline, "run", interrupt)
        code, _, err = bench(*self.RUN)
        assert code == 130
        assert "interrupted" in one_line(err)

    def test_a_bug_is_one_line_too(self, bench, monkeypatch):
        from bench.run.pipeline import Pipeline

        def bug(self):
            raise RuntimeError("oops")

        monkeypatch.setattr(Pipeline, "run", bug)
        code, _, err = bench(*self.RUN)
        assert code == 3
        assert "internal error: RuntimeError: oops" in one_line(err)


class TestData:
    def test_pack_info_verify(self, bench, tmp_path):
        source = tmp_path / "people"
        rng = np.random.default_rng(0)
        for person in ("Ada", "Bob"):
            (source / person).mkdir(parents=True)
            for number in (1, 2):
                pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(source / person / f"{person}_{number:04}.jpg")
        code, out, _ = bench("data", "pack", source, "--out", "packed")
        assert code == 0
        assert "4 images of 2 identities" in out
        code, out, _ = bench("data", "info", "packed", "--json")
        assert code == 0
        assert json.loads(out)["parts"][0]["images"] == 4
        assert bench("data", "info", "packed")[0] == 0
        code, out, _ = bench("data", "verify", "packed")
        assert code == 0
        assert "4 images checked" in out
        code, _, err = bench("data", "pack", source, "--out", "packed")
        assert code == 2
        assert "overwrit" in one_line(err)

    def test_verify_finds_damage(self, bench, tmp_path):
        (tmp_path / "people" / "Ada").mkdir(parents=True)
        for number in range(2):
            (tmp_path / "people" / "Ada" / f"{number}.jpg").write_bytes(b"\xff\xd8 broken")
        code, out, _ = bench("data", "verify", "people")
        assert code == 3
        assert "damaged" in out


def _pack(path):
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112)).save(buffer, "JPEG")
    path.write_bytes(pickle.dumps(([buffer.getvalue()] * 4, [True, False])))
