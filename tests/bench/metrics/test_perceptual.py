"""LPIPS against the package called directly, and every way in which the trunk can be missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lpips
import pytest
import torch
import torchvision

from bench.errors import DataError, MissingError
from bench.metrics.perceptual import ALEXNET_FILE, MIN_SIZE, Lpips, find_alexnet


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made AlexNet in the layout of torchvision's file; the classifier, which LPIPS ignores, kept tiny."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {k: v for k, v in torchvision.models.alexnet(weights=None).state_dict().items() if "features" in k}
    state["classifier.6.bias"] = torch.zeros(1)
    path = tmp_path_factory.mktemp("weights") / "made.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def metric(trunk: Path) -> Lpips:
    return Lpips(trunk, expected_sha256=digest(trunk)[:8])


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("BENCH_LPIPS_WEIGHTS", raising=False)
    return tmp_path / "checkpoints" / ALEXNET_FILE


def faces(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.rand(2, 5, 3, size, size, generator=torch.Generator().manual_seed(3)).unbind()
    return first, second


@pytest.mark.parametrize("size", [MIN_SIZE, 64, 112])
def test_equals_the_package_called_directly(metric: Lpips, trunk: Path, size: int) -> None:
    reference = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    state = torch.load(trunk, weights_only=True)
    for number in (1, 2, 3, 4, 5):
        for index, module in reference.net.get_submodule(f"slice{number}").named_children():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data = state[f"features.{index}.weight"]
                assert module.bias is not None
                module.bias.data = state[f"features.{index}.bias"]
    recovered, original = faces(size)
    expected = reference(recovered * 2 - 1, original * 2 - 1).flatten()
    value = metric(recovered, original, batch_size=2)
    assert value.shape == (5,)
    torch.testing.assert_close(value, expected.detach())
    assert (value > 1e-3).all()
    torch.testing.assert_close(metric(original, original), torch.zeros(5))


def test_the_learned_heads_are_the_packages_own(metric: Lpips) -> None:
    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", "cpu", weights_only=True)
    for number in range(5):
        torch.testing.assert_close(
            metric._network.get_parameter(f"lin{number}.model.1.weight"), heads[f"lin{number}.model.1.weight"]
        )


def test_loading_leaves_the_global_generator_alone(trunk: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Lpips(trunk, expected_sha256=digest(trunk))
    assert torch.equal(torch.rand(3), expected)


def test_the_environment_names_the_file_else_it_is_in_the_hub_cache(
    trunk: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_cache.parent.mkdir(parents=True)
    empty_cache.write_bytes(b"x")
    assert find_alexnet() == empty_cache
    monkeypatch.setenv("BENCH_LPIPS_WEIGHTS", str(trunk))
    assert find_alexnet() == trunk


def test_absent_weights_say_how_to_get_them(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError, match="no AlexNet weights in the torch hub cache; download https://") as caught:
        find_alexnet()
    assert str(empty_cache) in str(caught.value)
    assert "BENCH_LPIPS_WEIGHTS" in str(caught.value)
    monkeypatch.setenv("BENCH_LPIPS_WEIGHTS", "/nowhere/alexnet.pth")
    with pytest.raises(MissingError, match=r"/nowhere/alexnet\.pth does not exist"):
        find_alexnet()


def test_another_file_is_refused_by_its_hash(trunk: Path) -> None:
    with pytest.raises(MissingError, match="not torchvision's AlexNet"):
        Lpips(trunk)


@pytest.mark.parametrize("content", ["bytes", "list", "part", "narrow"])
def test_files_that_are_no_alexnet_are_refused(trunk: Path, tmp_path: Path, content: str) -> None:
    path, state = tmp_path / "wrong.pth", torch.load(trunk, weights_only=True)
    first, third = state["features.0.weight"], state["features.3.weight"]
    states = {
        "list": [1, 2],
        "part": {"features.0.weight": first},
        "narrow": state | {"features.3.weight": third[:, :1]},
    }
    if content == "bytes":
        path.write_bytes(b"not a checkpoint")
    else:
        torch.save(states[content], path)
    with pytest.raises(MissingError, match=r"wrong\.pth holds no AlexNet state dict"):
        Lpips(path, expected_sha256=digest(path))


def test_wrong_faces_are_refused(metric: Lpips) -> None:
    recovered, original = faces(64)
    with pytest.raises(DataError, match="share one shape"):
        metric(recovered[:3], original)
    with pytest.raises(DataError, match="at least 31"):
        metric(recovered[..., :30, :], original[..., :30, :])
    with pytest.raises(DataError, match="float"):
        metric(recovered.to(torch.uint8), original.to(torch.uint8))
