"""The command line: output, exit codes, and one clear line for every bad input."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from tiny_runs import registered

from bench.cli import app
from bench.commands.list import _version as version
from bench.results import RunPlan
from defenses.base import Defense


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


#: What neither a plan nor a list needs. Some of it takes longer to import than torch.
UNPLANNED = {
    *("lightning_fabric", "torchmetrics", "torchvision", "torch._dynamo", "scipy", "pandas", "pyarrow"),
    *("sklearn", "skimage", "matplotlib", "lpips", "onnx", "onnxruntime", "timm"),
}
if torch.__version__ >= "2.7":  # torch.utils.checkpoint of 2.6 imports it
    UNPLANNED.add("sympy")


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        ("--help", {"torch", "numpy", "pandas"}),
        ("run --help", {"torch", "numpy", "pandas"}),
        ("sweep --help", {"torch", "ray", "numpy"}),
        ("list settings", {"torch", "pandas"}),
        ("list metrics", {"torch", "pandas"}),
        ("doctor", {"torch", "torchvision", "onnxruntime"}),
        ("list defenses", UNPLANNED),
        ("run --defense partialface --attack linear,unet,linkage --dry-run", UNPLANNED),
    ],
)
def test_what_only_prints_imports_nothing_heavy(words, heavy):
    code = f"import sys, bench.cli; sys.argv = ['bench', *{words.split()}]\n"
    code += f"try: bench.cli.main()\nexcept SystemExit: pass\nassert not {heavy} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("command", "flag", "begun", "offered"),
    [
        ("run", "--defense", "partialf", ["partialface"]),
        ("run", "--defense", "partialface+quan", ["partialface+quantise"]),
        ("run", "--attack", "linear,unet", ["linear,unet", "linear,unet-ensemble"]),
        ("run", "--dataset", "s", ["synthetic"]),
        ("run", "--preset", "", ["quick", "cpu", "gpu", "paper"]),
        ("run", "--head", "cos", ["cosface"]),
        ("run", "--image-size", "", []),
        ("sweep", "--defenses", "blur,pix", ["blur,pixelate"]),
        ("sweep", "--knowledge", "w", ["whitebox"]),
        ("protect", "--defense", "pix", ["pixelate"]),
    ],
)
def test_what_a_shell_is_offered(command, flag, begun, offered):
    group: Any = typer.main.get_command(app)
    [option] = [option for option in group.commands[command].params if flag in option.opts]
    assert [item.value for item in option.shell_complete(None, begun)] == offered


def test_completion_is_installed_and_needs_no_torch(tmp_path):
    def call(*words, **variables):
        code = f"import sys, bench.cli; sys.argv = ['bench', *{words}]\n"
        code += "try: bench.cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'heavy import'"
        variables |= {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "_BENCH_COMPLETE=complete_bash" in call("--show-completion", "bash")
    call("--install-completion", "bash")
    assert "bench.sh" in (tmp_path / ".bashrc").read_text()
    words = {"COMP_WORDS": "bench run --attack hill", "COMP_CWORD": "3"}
    assert call(_BENCH_COMPLETE="complete_bash", **words) == "hill-climb\n"


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))
def test_each_spelling_of_a_flag_is_told_once(command):
    for option in typer.main.get_command(app).commands[command].params:
        assert len(set(option.opts)) == len(option.opts)


def test_no_arguments_is_help(bench):
    code, out, err = bench()
    assert code == 2
    assert "Usage" in out + err


@pytest.mark.parametrize(
    "kind", ["defenses", "attacks", "datasets", "recognisers", "backbones", "heads", "metrics", "settings"]
)
def test_list(bench, kind):
    code, out, _ = bench("list", kind, "--json")
    assert code == 0
    rows = json.loads(out)
    assert len({row["name"] for row in rows}) == len(rows) > 0
    code, out, _ = bench("list", kind)
    assert code == 0
    assert rows[0]["name"] in out


def test_a_list_is_made_once_and_needs_no_torch_then(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path))
    code = "import sys, bench.cli\nsys.argv = ['bench', 'list', 'attacks', '--json']\n"
    code += "try: bench.cli.main()\nexcept SystemExit: print('torch' in sys.modules, file=sys.stderr)"

    def listed() -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout, done.stderr.strip()

    first, heavy = listed()
    assert heavy == "True"
    assert listed() == (first, "False")
    (stored,) = tmp_path.rglob("*.json")
    stored.write_text(stored.read_text()[:-20])  # damaged: made anew
    assert listed() == (first, "True")


def test_a_list_does_without_a_cache_folder(bench, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "file"))
    code, out, err = bench("list", "heads", "--json")
    assert (code, err) == (0, "")
    assert "arcface" in {entry["name"] for entry in json.loads(out)}


def test_a_list_is_made_anew_for_other_code_or_other_packages(monkeypatch, tmp_path):
    versions = {version(tmp_path)}
    for change in (
        lambda: (tmp_path / "attacks").mkdir(),
        lambda: (tmp_path / "attacks/mine.py").write_text("summary = 'a'"),
        lambda: (tmp_path / "attacks/mine.py").write_text("summary = 'b'"),
        lambda: (tmp_path / "attacks/mine.py").rename(tmp_path / "attacks/other.py"),
        lambda: monkeypatch.syspath_prepend(tmp_path),
        lambda: (tmp_path / "torch-9.dist-info").mkdir(),
        lambda: (tmp_path / "torch-9.dist-info").rename(tmp_path / "torch-10.dist-info"),
    ):
        change()
        versions.add(version(tmp_path))
        assert version(tmp_path) in versions
    assert len(versions) == 1 + 5  # an empty folder is no code, and a folder on the path no package


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


def test_what_a_chain_takes(bench):
    entry = json.loads(bench("list", "defence", "partialface+quantise", "--json")[1])
    assert entry["name"] == "partialface+quantise"
    assert {"partialface.views", "quantise.bits"} <= {option["name"] for option in entry["options"]}
    code, _, err = bench("list", "defence", "partialface+quantize")
    assert (code, "did you mean 'quantise'" in one_line(err)) == (2, True)


@pytest.mark.parametrize(("words", "meant"), [(("atacks",), "attacks"), (("attack", "unnet"), "unet")])
def test_what_cannot_be_listed(bench, words, meant):
    code, _, err = bench("list", *words)
    assert (code, f"did you mean {meant!r}" in one_line(err)) == (2, True)


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


def test_the_settings_of_a_run_are_written_for_config(bench, monkeypatch, tmp_path):
    plan = RunPlan(run_id="r", device="cpu", precision="32-true", config={}, stages=[], seconds=0)
    seen = []
    monkeypatch.setattr("bench.run.pipeline.Pipeline.plan", lambda self, **_: seen.append(self.config) or plan)
    asked = ("run", "--attack", "linear", "--preset", "quick", "--dry-run", "--json")
    told = ("--defense", "partialface", "-o", "subset=2", "--set", "training.epochs=3", "--limit", "200")
    code, out, err = bench(*asked, *told, "--write-config", "run.toml")
    assert (code, json.loads(out)["run_id"], err) == (0, "r", "settings written to run.toml\n")
    assert bench("run", "--config", "run.toml", "--dry-run")[0] == 0
    assert seen[0] == seen[1]
    assert (seen[0].defense_options, seen[0].training.epochs, seen[0].limit) == ({"subset": "2"}, 3, 200)
    code, _, err = bench(*asked, *told, "--write-config", "run.toml")
    assert (code, "run.toml exists" in one_line(err)) == (2, True)


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
        ("content", "code", "message"),
        [
            (None, 5, "does not exist"),
            (lambda photo: b"not an image", 3, "face.png"),
            (lambda photo: b"", 3, "face.png"),
            (lambda photo: photo[:-500], 3, "face.png"),
        ],
        ids=["absent", "text", "empty", "truncated"],
    )
    def test_bad_images(self, bench, photo, content, code, message, tmp_path):
        before = photo.read_bytes()
        photo.unlink()
        if content:
            photo.write_bytes(content(before))
        got, _, err = bench("protect", photo, "--defense", "none", "--out", "p.npz")
        assert (got, message in one_line(err)) == (code, True)
        assert not (tmp_path / "p.npz").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--defense", "partailface"), "did you mean 'partialface'"),
            (("--defense", "partialface", "-o", "colour=1"), "unknown key 'colour'"),
            (("--defense", "partialface", "-o", "subset=99"), "subset"),
            (("--defense", "partialface", "-o", "subset"), "write key=value"),
            (("--defense", "none", "--out", "p.csv"), ".npz"),
        ],
    )
    def test_bad_options(self, bench, photo, arguments, message):
        code, _, err = bench("protect", photo, "--out", "p.npz", *arguments)
        assert (code, message in one_line(err)) == (2, True)


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

    @pytest.mark.parametrize(
        ("given", "kinds"),
        [(("--attack", "unet"), ["defenses"]), (("--defense", "none"), ["attacks"]), ((), ["defenses", "attacks"])],
    )
    def test_missing_names_are_asked_for_with_what_there_is(self, bench, given, kinds):
        code, _, err = bench("run", *given)
        assert code == 2
        told = [f"--{kind.removesuffix('s')} is missing: available: " for kind in ("defenses", "attacks")]
        assert [part in one_line(err) for part in told] == [kind in kinds for kind in ("defenses", "attacks")]
        for kind in kinds:
            assert ", ".join(entry["name"] for entry in json.loads(bench("list", kind, "--json")[1])) in err

    def test_a_defence_may_be_spelt_with_a_c(self, bench):
        code, _, err = bench("run", "--defence", "nonesuch", "--attack", "unet")
        assert code == 2
        assert "unknown defence 'nonesuch'" in one_line(err)

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
            lambda root: [_person(root / f"p{number}", (32, 32)) for number in range(30)],
        ],
        ids=["empty", "stray", "nobody", "one image each"],
    )
    def test_useless_folder(self, bench, empty_pack, make):
        make(empty_pack)
        code, _, err = bench(*self.RUN, "--dataset", "folder", "--data-root", empty_pack)
        assert code in (3, 5)
        assert str(empty_pack) in one_line(err) or "faces" in err or "identit" in err

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

    @pytest.mark.parametrize(
        "make", [lambda path: path.write_text(""), lambda path: path.mkdir(mode=0o500)], ids=["file", "no permission"]
    )
    def test_out_that_cannot_be_written(self, bench, tmp_path, make):
        make(tmp_path / "locked")
        if (tmp_path / "locked").is_dir() and os.access(tmp_path / "locked", os.W_OK):
            pytest.skip("root may write anywhere")
        code, _, err = bench(*self.RUN, "--out", tmp_path / "locked")
        assert code == 2
        assert "locked cannot be written" in one_line(err)

    def test_no_space_left(self, bench, monkeypatch, photo):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device", "p.npz")

        monkeypatch.setattr(np, "savez", full)
        code, _, err = bench("protect", photo, "--defense", "none", "--out", "p.npz")
        assert code == 3
        assert "no space left on the disk (p.npz)" in one_line(err)
        assert not Path("p.npz").exists()

    @pytest.mark.parametrize(
        ("raised", "code", "message"),
        [
            (KeyboardInterrupt(), 130, "interrupted"),
            (RuntimeError("oops"), 3, "internal error: RuntimeError: oops"),  # a bug is one line, too
            (
                torch.OutOfMemoryError("CUDA out of memory."),
                3,
                "the accelerator's memory is full, of however few",
            ),
        ],
    )
    def test_what_ends_a_run(self, bench, monkeypatch, raised, code, message):
        from bench.run.pipeline import Pipeline

        def end(self, **_):
            raise raised

        monkeypatch.setattr(Pipeline, "run", end)
        got, _, err = bench(*self.RUN)
        assert (got, message in one_line(err)) == (code, True)


class TestData:
    def test_pack_info_verify(self, bench, tmp_path):
        for person in ("Ada", "Bob"):
            _person(tmp_path / "people" / person, (112, 112), images=2)
        code, out, _ = bench("data", "pack", "people", "--out", "packed")
        assert (code, "4 images of 2 identities" in out) == (0, True)
        code, out, _ = bench("data", "info", "packed", "--json")
        assert (code, json.loads(out)["parts"][0]["images"]) == (0, 4)
        assert bench("data", "info", "packed")[0] == 0
        code, out, _ = bench("data", "verify", "packed")
        assert (code, "4 images checked" in out) == (0, True)
        code, _, err = bench("data", "pack", "people", "--out", "packed")
        assert (code, "overwrit" in one_line(err)) == (2, True)

    def test_info_says_what_it_leaves_out(self, bench, tmp_path):
        _person(tmp_path / "people" / "Ada" / "s1", (112, 112), images=2)
        _person(tmp_path / "people" / "Bob" / "s1", (112, 112), images=2)
        for name in ("a.txt", "b.txt"):
            (tmp_path / "people" / "Ada" / "s1" / name).touch()
        code, out, _ = bench("data", "info", "people")
        lines = out.splitlines()
        assert code == 0
        assert ".: left out 2: not named like an image (.txt)" in lines
        assert any("images two folders down" in line for line in lines)
        left_out = json.loads(bench("data", "info", "people", "--json")[1])["parts"][0]["left_out"]
        assert left_out == {"not named like an image (.txt)": 2}

    def test_verify_sees_damage(self, bench, tmp_path):
        (tmp_path / "people" / "Ada").mkdir(parents=True)
        for number in range(2):
            (tmp_path / "people" / "Ada" / f"{number}.jpg").write_bytes(b"\xff\xd8 broken")
        code, out, _ = bench("data", "verify", "people")
        assert (code, "damaged" in out) == (3, True)


def _person(folder, size, images=1):
    """A folder of noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(images):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            folder / f"{folder.name}_{number:04}.jpg"
        )


def _pack(path):
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112)).save(buffer, "JPEG")
    path.write_bytes(pickle.dumps(([buffer.getvalue()] * 4, [True, False])))


class _Loud(Defense):
    name, summary = "loud", "says what it does"

    def __init__(self, options=None, *, image_size):
        super().__init__(options, image_size=image_size)
        print("loud is made")

    representation_shape = property(lambda self: (3, self.image_size, self.image_size))

    def transform(self, faces, state, generator):
        return faces


def test_what_a_plugin_prints_is_no_part_of_the_result(bench, photo):
    with registered(_Loud):
        code, out, told = bench("protect", photo, "--defense", "loud", "--out", "faces.npz", "--json")
    assert (code, json.loads(out)["shape"]) == (0, [1, 3, 112, 112])
    assert "loud is made" in told


def test_a_plugin_cannot_end_the_process_as_if_all_were_well(bench, monkeypatch):
    def leave(kind):
        raise SystemExit(0)

    monkeypatch.setattr("bench.commands.list._remembered", leave)
    code, out, told = bench("list", "defenses")
    assert (code, out) == (3, "")
    assert "wanted to end the process (SystemExit: 0)" in told
