"""`bench view`: what it needs, where it listens, and what it prints."""

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from run_folders import write_run


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_its_packages_it_says_which_extra(bench, tmp_path, monkeypatch, package):
    (tmp_path / "runs").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "reports.view"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = bench("view", "runs")
    assert (code, out) == (5, "")
    assert re.sub(r"\x1b\[[\d;]*m", "", err).strip().endswith("pip install ppfr-bench[view]")
    assert len(err.splitlines()) == 1


def test_a_folder_that_is_not_there(bench):
    code, _, err = bench("view", "nowhere")
    assert (code, "nowhere" in err) == (5, True)


def test_a_port_that_is_taken(bench, tmp_path):
    pytest.importorskip("uvicorn")
    (tmp_path / "runs").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = bench("view", "runs", "--port", taken.getsockname()[1])
    assert (code, "--port" in err) == (2, True)


def test_the_address_it_prints_is_answered_and_no_other(tmp_path):
    """The command itself: on the loopback address alone, until it is interrupted."""
    pytest.importorskip("uvicorn")
    write_run(tmp_path / "runs" / "a", samples=False)
    command = [sys.executable, "-m", "bench", "view", str(tmp_path / "runs"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            document = ""
            while not document.rstrip().endswith("}"):
                document += process.stdout.readline() or pytest.fail(process.stderr.read())
            address = json.loads(document)["address"]
            base, token = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)([\w-]{32})/", address).groups()
            with urllib.request.urlopen(address, timeout=20) as answer:
                assert "partialface" in answer.read().decode()
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{base}{token[::-1]}/", timeout=20)
            assert refused.value.code == 403
            refused.value.close()
        finally:
            process.terminate()
        told, said = process.communicate(timeout=20)
    assert (process.returncode, told, said) == (0, "", "")
