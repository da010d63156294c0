from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bench.commands import doctor
from bench.commands.doctor import Check, diagnose

NMS = "operator torchvision::nms does not exist"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """This process's environment without BENCH_* variables, with all caches below ``tmp_path``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BENCH_")}
    cache = tmp_path / "cache"
    return {**kept, "TORCH_HOME": str(cache / "torch"), "BENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def by_name(checks: list[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks), "two checks share a name"
    return found


def fake_package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


def test_a_working_installation_has_nothing_failing(environment: dict[str, str], tmp_path: Path) -> None:
    checks = by_name(diagnose(out=tmp_path / "runs", environment=environment))
    assert [check for check in checks.values() if check.status == "fail"] == []
    import torch
    import torchvision

    assert checks["torch"].detail.startswith(f"{torch.__version__} (")
    assert checks["torchvision"].detail.startswith(f"{torchvision.__version__}, ")
    assert "torch uses 1 threads" in checks["CPU"].detail
    assert checks["LPIPS weights"].status == "warn"
    assert doctor.LPIPS_TRUNK_URL in str(checks["LPIPS weights"].remedy)
    assert not (tmp_path / "runs").exists(), "looking must not create the run folder"


@pytest.mark.parametrize(
    ("torch_source", "expected"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("print('hello'); raise SystemExit(0)", "unexpected output: hello"),
        ("print([1]); raise SystemExit(0)", "unexpected output: [1]"),
    ],
    ids=["import-error", "exit", "crash", "noise", "not-an-object"],
)
def test_broken_torch_is_reported_and_nothing_else_breaks(
    environment: dict[str, str], tmp_path: Path, torch_source: str, expected: str
) -> None:
    fake_package(tmp_path / "site", "torch", torch_source)
    environment["PYTHONPATH"] = str(tmp_path / "site")
    checks = by_name(diagnose(out=tmp_path / "runs", environment=environment))
    assert checks["torch"].status == "fail"
    assert expected in checks["torch"].detail
    assert "from one place" in str(checks["torch"].remedy)
    assert "torchvision" not in checks, "nothing can be said of torchvision before torch imports"
    assert checks["devices"].status == "warn"
    assert checks["run folder"].status == "ok"


def test_a_probe_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT", 0.5)
    assert doctor.probe("import time; time.sleep(60)") == {"crash": "no answer within 0.5 s"}


def test_a_file_called_torch_in_the_current_folder_is_not_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert doctor.probe("import colorsys, json; print(json.dumps({'found': True}))") == {"found": True}


def test_mismatched_pair_is_explained(environment: dict[str, str], tmp_path: Path) -> None:
    fake_package(tmp_path / "site", "torchvision", f"raise RuntimeError({NMS!r})")
    environment["PYTHONPATH"] = str(tmp_path / "site")
    checks = by_name(diagnose(out=tmp_path / "runs", environment=environment))
    assert checks["torch"].status == "ok"
    assert checks["torchvision"].status == "fail"
    assert "built for another torch" in checks["torchvision"].detail
    assert NMS in checks["torchvision"].detail
    remedy = str(checks["torchvision"].remedy)
    assert "pip install torch torchvision" in remedy
    assert "find-links" in remedy


def test_a_torchvision_broken_otherwise_is_not_called_a_mismatch() -> None:
    found = {"torch": "2.9.0", "cuda_build": None, "torchvision_error": "ImportError: no PIL"}
    check = doctor.check_torch(found)[1]
    assert check.status == "fail"
    assert "another torch" not in check.detail
    assert "no PIL" in check.detail


def test_missing_torch_asks_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda distribution: None)
    [check] = doctor.check_torch({"torch_error": "ModuleNotFoundError: No module named 'torch'"})
    assert (check.status, check.remedy) == ("fail", "pip install torch torchvision")


def test_missing_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda distribution: None)
    found = {"torch": "2.9", "cuda_build": "13", "torchvision_error": "ModuleNotFoundError: No module named 'x'"}
    check = doctor.check_torch(found)[1]
    assert (check.status, check.detail) == ("fail", "not installed")


@pytest.mark.parametrize(
    ("found", "driver", "status", "words"),
    [
        ({}, False, "warn", "unknown"),
        ({"torch": "2", "cuda_build": None, "mps": False}, False, "ok", "CPU only"),
        ({"torch": "2", "cuda_build": None, "mps": True}, False, "ok", "mps"),
        ({"torch": "2", "cuda_build": None, "mps": False}, True, "warn", "CPU-only build"),
        ({"torch": "2", "cuda_build": "13.2", "mps": False}, True, "warn", "no usable GPU"),
        (
            {"torch": "2", "cuda_build": "13.2", "devices": [{"name": "H200", "memory": 150e9}], "bf16": True},
            True,
            "ok",
            "H200 (150 GB); bfloat16",
        ),
        (
            {"torch": "2", "cuda_build": "12.4", "devices": [{"name": "T4", "memory": 16e9}], "bf16": False},
            True,
            "warn",
            "no bfloat16",
        ),
    ],
)
def test_devices(found: dict[str, object], driver: bool, status: str, words: str) -> None:
    check = doctor.check_devices(found, driver)
    assert check.status == status
    assert words in check.detail


def test_threads_beyond_the_cores_are_warned_of() -> None:
    assert doctor.check_threads(2, 2).status == "ok"
    check = doctor.check_threads(8, 2)
    assert (check.status, check.remedy) == ("warn", "export OMP_NUM_THREADS=2")


def test_memory_is_cut_by_the_cgroup_limit(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1000000000\n")
    check = doctor.check_memory(limit)
    assert check.status == "warn"
    assert check.detail.endswith("of 1.0 GB available")
    limit.write_text("max\n")
    assert not doctor.check_memory(limit).detail.endswith("of 1.0 GB available")


def test_requirements_that_are_not_met() -> None:
    requirements = [
        "numpy>=1",
        "numpy>=999",
        "no-such-distribution",
        "no-such-distribution; extra == 'one'",
        "numpy>=998; extra == 'one'",
        "no-such-distribution; python_version < '3'",
    ]
    plain = doctor.unmet(requirements)
    assert [p.split()[0] for p in plain] == ["numpy", "no-such-distribution"]
    assert plain[0].endswith("needs >=999")
    one = doctor.unmet(requirements, "one")
    assert [p.split()[0] for p in one] == ["no-such-distribution", "numpy"]
    assert one[1].endswith("needs >=998")


def test_absent_extras_are_no_failure_and_missing_dependencies_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "pytest")
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    checks = by_name(doctor.check_dependencies())
    assert checks["dependencies"].status == "fail"
    assert "pluggy is missing" in checks["dependencies"].detail
    assert checks["extra 'dev'"].status == "ok"
    assert "pip install 'pytest[dev]'" in str(checks["extra 'dev'"].remedy)


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    [check] = doctor.check_dependencies()
    assert (check.status, check.remedy) == ("warn", "pip install -e .")


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    check = doctor.check_folder("run folder", tmp_path / "runs" / "deep", "--out")
    assert check.status == "fail"
    assert "is a file" in check.detail
    assert "--out" in str(check.remedy)


def test_folder_that_cannot_be_written() -> None:
    # /proc refuses new files to everybody, root included.
    if not Path("/proc/self").exists():
        pytest.skip("no /proc on this system")
    check = doctor.check_folder("run folder", Path("/proc/runs"), "--out")
    assert check.status == "fail"
    assert "not writable" in check.detail


@pytest.mark.parametrize(("free", "status"), [(1e8, "fail"), (2e9, "warn"), (1e11, "ok")])
def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert doctor.check_folder("run folder", tmp_path, "--out").status == status
    assert list(tmp_path.iterdir()) == []


def test_lpips_trunk_is_checked_by_its_checksum(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = doctor.torch_hub_checkpoints(environment) / doctor.LPIPS_TRUNK
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    check = doctor.check_lpips(environment)
    assert check.status == "warn"
    assert "truncated" in check.detail
    monkeypatch.setattr(doctor, "LPIPS_TRUNK_SHA256_PREFIX", hashlib.sha256(b"weights").hexdigest()[:8])
    assert doctor.check_lpips(environment).status == "ok"
    environment["BENCH_LPIPS_WEIGHTS"] = str(tmp_path / "absent.pth")
    assert doctor.check_lpips(environment).status == "fail", "what is named wins over the cache"


def test_trunk_and_cache_agree_with_the_metric(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    perceptual = pytest.importorskip("bench.metrics.perceptual")
    assert doctor.LPIPS_TRUNK == perceptual.ALEXNET_FILE
    assert doctor.LPIPS_TRUNK_SHA256_PREFIX == perceptual.ALEXNET_SHA256
    assert doctor.LPIPS_TRUNK_URL == perceptual.ALEXNET_URL
    monkeypatch.delenv("BENCH_LPIPS_WEIGHTS", raising=False)
    import torch

    for variables in ({"TORCH_HOME": environment["TORCH_HOME"]}, {"XDG_CACHE_HOME": "/somewhere"}, {}):
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(doctor.torch_hub_checkpoints(os.environ)) == f"{torch.hub.get_dir()}/checkpoints"


def test_downloads_are_looked_for_where_they_are_put(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_CACHE", raising=False)
    lfw = pytest.importorskip("bench.data.sources.lfw")
    assert doctor.cache_folder(os.environ) / "lfw" == lfw.default_root()
    assert doctor.cache_folder({"BENCH_CACHE": "/elsewhere"}) == Path("/elsewhere")


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
        ("good", "ok", "['N', 3, 112, 112] -> ['N', 3]"),
        ("one-channel", "fail", "not (N, 3, H, W) to (N, D)"),
        ("garbage", "fail", "no model that onnxruntime can load"),
        ("absent", "fail", "is no file"),
        ("unset", "ok", "trains its own"),
    ],
)
def test_evaluator(environment: dict[str, str], tmp_path: Path, kind: str, status: str, words: str) -> None:
    path = tmp_path / "evaluator.onnx"
    if kind in ("good", "one-channel"):
        onnx_model(path, 3 if kind == "good" else 1)
    elif kind == "garbage":
        path.write_bytes(b"not a network")
    if kind != "unset":
        environment["BENCH_EVALUATOR"] = str(path)
    found = doctor.probe(doctor.ONNX_PROBE, *([str(path)] if kind != "unset" else []), environment=environment)
    runtime, evaluator = doctor.check_evaluator(found, environment)
    assert runtime.status == "ok"
    assert "CPU" in runtime.detail
    assert evaluator.status == status
    assert words in evaluator.detail


@pytest.mark.parametrize(("variables", "status"), [({}, "warn"), ({"BENCH_EVALUATOR": "x.onnx"}, "fail")])
def test_broken_onnxruntime_matters_only_to_an_onnx_evaluator(variables: dict[str, str], status: str) -> None:
    [check] = doctor.check_evaluator({"error": "ImportError: no"}, variables)
    assert check.status == status


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        (["train.rec", "train.idx", "property", "lfw.bin"], "ok", "train.rec, train.idx, property, lfw.bin"),
        (["train.rec"], "fail", "train.idx is missing"),
        (["train.idx"], "fail", "train.rec is missing"),
        (["Ada/1.png", "Bob/1.png"], "ok", "2 folders"),
        ([], "fail", "is empty"),
    ],
)
def test_data_root(tmp_path: Path, files: list[str], status: str, words: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    check = doctor.check_data_root({"BENCH_DATA_ROOT": str(tmp_path)})
    assert check.status == status
    assert words in check.detail


def test_data_root_that_is_not_there(tmp_path: Path) -> None:
    check = doctor.check_data_root({"BENCH_DATA_ROOT": str(tmp_path / "nowhere")})
    assert check.status == "fail"
    assert "No such file" in check.detail


def test_lfw_in_the_cache_is_found(tmp_path: Path) -> None:
    assert doctor.check_lfw(tmp_path).detail.startswith("not in")
    (tmp_path / "lfw-funneled.tgz").write_bytes(b"")
    assert "lfw-funneled.tgz" in doctor.check_lfw(tmp_path).detail


def test_unknown_variables_are_warned_of() -> None:
    check = doctor.check_variables({"BENCH_SEDE": "1", "BENCH_SEED": "2", "HOME": "/"})
    assert (check.status, check.detail) == ("warn", "unknown: BENCH_SEDE (did you mean BENCH_SEED?)")
    assert doctor.check_variables({"BENCH_SEED": "2", "HOME": "/"}).status == "ok"


def test_a_check_that_breaks_does_not_end_the_report(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Check:
        raise ValueError("two\nlines")

    def incomplete() -> Check:
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")

    monkeypatch.setattr(doctor, "probe", lambda *arguments, **options: {"crash": "not run"})
    monkeypatch.setattr(doctor, "check_python", broken)
    monkeypatch.setattr(doctor, "check_memory", incomplete)
    checks = by_name(diagnose(out=tmp_path, environment=environment))
    assert checks["Python"] == Check(
        "Python", "warn", "could not be checked: ValueError: two lines", "please report this"
    )
    assert checks["memory"].remedy == "pip install psutil"
    assert checks["environment"].status == "ok"


def test_the_command_survives_a_broken_torch(environment: dict[str, str], tmp_path: Path) -> None:
    """End to end: `bench doctor` itself must not import torch."""
    fake_package(tmp_path / "site", "torch", "raise ImportError('broken on purpose')")
    root = Path(doctor.__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), str(root)])
    done = subprocess.run(
        [sys.executable, "-m", "bench", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert "broken on purpose" in checks["torch"]["detail"]
    assert "Traceback" not in done.stderr
