from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bench.commands import doctor
from bench.commands.doctor import Check, diagnose
from bench.errors import MissingError
from bench.metrics.perceptual import Lpips

NMS = "operator torchvision::nms does not exist"


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """No BENCH_* variables, with all caches below ``tmp_path``."""
    for name in [name for name in os.environ if name.startswith("BENCH_")]:
        monkeypatch.delenv(name)
    caches = {"TORCH_HOME": str(tmp_path / "cache" / "torch"), "BENCH_CACHE": str(tmp_path / "cache")}
    for name, value in {**caches, "OMP_NUM_THREADS": "1", "BENCH_OUT": str(tmp_path / "runs")}.items():
        monkeypatch.setenv(name, value)


def by_name(checks: list[Check]) -> dict[str, Check]:
    named = {check.name: check for check in checks}
    assert len(named) == len(checks), "two checks share a name"
    return named


def diagnosed_with(monkeypatch: pytest.MonkeyPatch, site: Path, package: str, source: str) -> dict[str, Check]:
    """The report where ``package`` is replaced by a file of ``source``."""
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(site))
    return by_name(diagnose())


def test_a_working_installation_has_nothing_failing(tmp_path):
    import torch
    import torchvision

    checks = by_name(diagnose())
    assert [check for check in checks.values() if check.status == "fail"] == []
    assert checks["torch"].detail.startswith(f"{torch.__version__} (")
    assert checks["torchvision"].detail.startswith(f"{torchvision.__version__}, ")
    assert "torch uses 1 threads" in checks["CPU"].detail
    assert checks["LPIPS weights"].status == "warn"
    assert str(tmp_path / "cache" / "torch" / "hub" / "checkpoints") in str(checks["LPIPS weights"].remedy)
    assert not (tmp_path / "runs").exists(), "looking must not create the run folder"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("print('hello'); raise SystemExit(0)", "unexpected output: hello"),
        ("print([1]); raise SystemExit(0)", "unexpected output: [1]"),
    ],
    ids=["import-error", "exit", "crash", "noise", "not-an-object"],
)
def test_broken_torch_is_reported_and_nothing_else_breaks(monkeypatch, tmp_path, source, expected):
    checks = diagnosed_with(monkeypatch, tmp_path / "site", "torch", source)
    assert checks["torch"].status == "fail"
    assert expected in checks["torch"].detail
    assert "from one place" in str(checks["torch"].remedy)
    assert "torchvision" not in checks, "nothing can be said of torchvision before torch imports"
    assert [checks[name].status for name in ("devices", "LPIPS weights", "run folder")] == ["warn", "warn", "ok"]


def test_a_probe_that_hangs_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT", 0.5)
    assert doctor.probe("import time; time.sleep(60)") == {"crash": "no answer within 0.5 s"}


def test_a_file_called_torch_in_the_current_folder_is_not_torch(tmp_path, monkeypatch):
    (tmp_path / "colorsys.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert doctor.probe("import colorsys, json; print(json.dumps({'seen': True}))") == {"seen": True}


def test_mismatched_pair_is_explained(monkeypatch, tmp_path):
    checks = diagnosed_with(monkeypatch, tmp_path / "site", "torchvision", f"raise RuntimeError({NMS!r})")
    assert [checks[name].status for name in ("torch", "torchvision")] == ["ok", "fail"]
    assert "built for another torch" in checks["torchvision"].detail
    assert NMS in checks["torchvision"].detail
    assert "pip install torch torchvision" in str(checks["torchvision"].remedy)


@pytest.mark.parametrize(
    ("probed", "version", "detail"),
    [
        ({"torch_error": "ModuleNotFoundError: No module named 'torch'"}, None, "not installed"),
        ({"torch": "2.9", "torchvision_error": "ModuleNotFoundError: No module named 'x'"}, None, "not installed"),
        (
            {"torch": "2.9", "torchvision_error": "ImportError: no PIL"},
            "0.24",
            "0.24 does not import with torch 2.9: ImportError: no PIL",
        ),
    ],
)
def test_what_is_missing_or_broken_is_no_mismatch(monkeypatch, probed, version, detail):
    monkeypatch.setattr(doctor, "installed", lambda distribution: version)
    check = doctor.check_torch(probed)[-1]
    assert (check.status, check.detail.startswith(detail)) == ("fail", True)
    assert "pip install torch torchvision" in str(check.remedy)


GPU = {"torch": "2", "cuda_build": "13.2"}
CPU = {"torch": "2", "cuda_build": None}


@pytest.mark.parametrize(
    ("probed", "driver", "status", "words"),
    [
        ({}, False, "warn", "unknown"),
        (CPU, False, "ok", "CPU only"),
        ({**CPU, "mps": True}, False, "ok", "mps"),
        (CPU, True, "warn", "CPU-only build"),
        (GPU, True, "warn", "no usable GPU"),
        ({**GPU, "devices": [{"name": "H200", "memory": 150e9}], "bf16": True}, True, "ok", "H200 (150 GB); bfloat16"),
        ({**GPU, "devices": [{"name": "T4", "memory": 16e9}], "bf16": False}, True, "warn", "no bfloat16"),
    ],
)
def test_devices(probed, driver, status, words):
    check = doctor.check_devices(probed, driver)
    assert check.status == status
    assert words in check.detail


def test_a_gpu_without_a_compiler_is_warned_of():
    there = {**GPU, "devices": [{"name": "H200", "memory": 150e9}]}
    assert doctor.check_compiler(CPU, None) == []
    assert [check.status for check in doctor.check_compiler(there, "/usr/bin/gcc")] == ["ok"]
    (check,) = doctor.check_compiler(there, None)
    assert (check.status, check.remedy) == ("warn", "install gcc, or name a compiler by CC")


def test_threads_beyond_the_cores_are_warned_of():
    assert doctor.check_threads(2, 2).status == "ok"
    check = doctor.check_threads(8, 2)
    assert (check.status, check.remedy) == ("warn", "export OMP_NUM_THREADS=2")


def test_memory_is_cut_by_the_cgroup_limit(tmp_path):
    limit = tmp_path / "memory.max"
    limit.write_text("1000000000\n")
    check = doctor.check_memory(limit)
    assert check.status == "warn"
    assert check.detail.endswith("of 1.0 GB available")
    limit.write_text("max\n")
    assert not doctor.check_memory(limit).detail.endswith("of 1.0 GB available")


def test_requirements_that_are_not_met(monkeypatch):
    requirements = [
        "numpy>=1",
        "numpy>=999",
        "no-such-distribution",
        "no-such-distribution; extra == 'one'",
        "numpy>=998; extra == 'one'",
        "no-such-distribution; python_version < '3'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda distribution: requirements)
    project, extra = doctor.unmet(), doctor.unmet("one")
    assert [problem.split()[0] for problem in project] == ["numpy", "no-such-distribution"]
    assert project[0].endswith("needs >=999")
    assert [problem.split()[0] for problem in extra] == ["no-such-distribution", "numpy"]
    assert extra[1].endswith("needs >=998")


def test_absent_extras_are_no_failure_and_missing_dependencies_are(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "pytest")
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    checks = by_name(doctor.check_dependencies())
    assert [checks[name].status for name in ("dependencies", "extra 'dev'")] == ["fail", "ok"]
    assert "pluggy is missing" in checks["dependencies"].detail
    assert "pip install 'pytest[dev]'" in str(checks["extra 'dev'"].remedy)
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")  # a checkout
    [check] = doctor.check_dependencies()
    assert (check.status, check.remedy) == ("warn", "pip install -e .")


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    check = doctor.check_folder("run folder", tmp_path / "file" / "deep", "--out")
    assert (check.status, check.detail) == ("fail", f"{tmp_path / 'file'} is a file")
    assert "--out" in str(check.remedy)
    if Path("/proc/self").exists():  # /proc refuses new files to everybody, root included
        check = doctor.check_folder("run folder", Path("/proc/runs"), "--out")
        assert (check.status, "not writable" in check.detail) == ("fail", True)


@pytest.mark.parametrize(("free", "status"), [(1e8, "fail"), (2e9, "warn"), (1e11, "ok")])
def test_disk_space(tmp_path, monkeypatch, free, status):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert doctor.check_folder("run folder", tmp_path, "--out").status == status
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_the_lpips_trunk_is_said_by_who_loads_it(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"weights")
    with pytest.raises(MissingError) as caught:
        Lpips(tmp_path / "weights.pth")
    probed = {"lpips_error": f"MissingError: {caught.value}"}
    check = doctor.check_lpips(probed)
    assert (check.status, "not torchvision's AlexNet" in check.detail) == ("warn", True)
    assert str(check.remedy).startswith("download https://")
    monkeypatch.setenv("BENCH_LPIPS_WEIGHTS", str(tmp_path / "weights.pth"))
    assert doctor.check_lpips(probed).status == "fail", "what is named has to be right"
    assert doctor.check_lpips({"lpips": "weights.pth"}).status == "ok"


def onnx_model(path: Path, channels: int) -> Path:
    """An ONNX network (N, channels, 112, 112) -> (N, channels): a global average."""
    node = helper.make_node("ReduceMean", ["input"], ["embedding"], axes=[2, 3], keepdims=0)
    graph = helper.make_graph(
        [node],
        "mean",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", channels, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", channels])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("good", "ok", "evaluator.onnx: NCHW 112x112 -> 3"),
        ("one-channel", "fail", "must map (N, 3, H, W) or"),
        ("garbage", "fail", "no ONNX model that onnxruntime can load"),
        ("absent", "fail", "is no file"),
        ("unset", "ok", "trains its own"),
    ],
)
def test_evaluator(tmp_path, monkeypatch, kind, status, words):
    path = tmp_path / "evaluator.onnx"
    if kind in ("good", "one-channel"):
        onnx_model(path, 3 if kind == "good" else 1)
    elif kind == "garbage":
        path.write_bytes(b"not a network")
    if kind != "unset":
        monkeypatch.setenv("BENCH_EVALUATOR", str(path))
    runtime, evaluator = doctor.check_evaluator(doctor.probe_evaluators())
    assert (runtime.status, evaluator.status) == ("ok", status)
    assert "CPU" in runtime.detail
    assert words in evaluator.detail


@pytest.mark.parametrize(("evaluator", "status"), [("", "warn"), ("x.onnx", "fail")])
def test_broken_onnxruntime_matters_only_to_an_onnx_evaluator(monkeypatch, evaluator, status):
    monkeypatch.setenv("BENCH_EVALUATOR", evaluator)
    [check] = doctor.check_evaluator({"onnxruntime_error": "ImportError: no"})
    assert check.status == status


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        (["train.rec", "train.idx", "property", "lfw.bin"], "ok", "train.rec, train.idx, property, lfw.bin"),
        (["train.rec"], "fail", "train.idx is missing"),
        (["train.idx"], "fail", "train.rec is missing"),
        (["Ada/1.png", "Bob/1.png"], "ok", "2 folders"),
        ([], "fail", "is empty"),
        (None, "fail", "No such file"),
    ],
)
def test_data_root(tmp_path, monkeypatch, files, status, words):
    root = tmp_path / "faces"
    if files is not None:
        root.mkdir()
    for file in files or []:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(b"")
    monkeypatch.setenv("BENCH_DATA_ROOT", str(root))
    check = doctor.check_data_root()
    assert check.status == status
    assert words in check.detail


def test_lfw_in_the_cache_is_seen(tmp_path):
    assert doctor.check_lfw().detail.startswith("not in")
    (tmp_path / "cache" / "lfw").mkdir(parents=True)
    (tmp_path / "cache" / "lfw" / "lfw-funneled.tgz").write_bytes(b"")
    assert "lfw-funneled.tgz" in doctor.check_lfw().detail


def test_unknown_variables_are_warned_of(monkeypatch):
    assert doctor.check_variables().status == "ok"
    monkeypatch.setenv("BENCH_SEDE", "1")
    check = doctor.check_variables()
    assert (check.status, check.detail) == ("warn", "unknown: BENCH_SEDE (did you mean BENCH_SEED?)")


def test_a_check_that_breaks_does_not_end_the_report(monkeypatch):
    def broken() -> Check:
        raise ValueError("two\nlines")

    def incomplete() -> Check:
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")

    monkeypatch.setattr(doctor, "probe", lambda *arguments: {"crash": "not run"})
    monkeypatch.setattr(doctor, "check_lfw", broken)
    monkeypatch.setattr(doctor, "check_memory", incomplete)
    checks = by_name(diagnose())
    assert checks["LFW"] == Check("LFW", "warn", "could not be checked: ValueError: two lines", "please report this")
    assert checks["memory"].remedy == "pip install psutil"
    assert checks["environment"].status == "ok"
