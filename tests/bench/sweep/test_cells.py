"""The grid: every combination once, resolved through all layers; what cannot be run is refused before any compute."""

import pytest
from sweep_at_work import grid

from bench import plugins
from bench.errors import MissingError, UsageError
from bench.sweep.cells import Cell, check, expand
from bench.sweep.journal import sweep_directory
from bench.sweep.options import SweepOptions, addressed


def names(configs):
    return [(config.seed, config.defense, config.attack, config.knowledge) for config in configs]


def test_every_combination_those_of_one_recogniser_together(tmp_path):
    configs = expand(grid(tmp_path, attacks="unet,linkage", knowledge="whitebox,oracle"))
    assert len(configs) == 16
    assert names(configs)[:4] == [
        (0, "none", "unet", "whitebox"),
        (0, "none", "unet", "oracle"),
        (0, "none", "linkage", "whitebox"),
        (0, "none", "linkage", "oracle"),
    ]
    groups = [Cell(config).group for config in configs]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [4, 4, 4, 4]
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index)
    assert all(config.preset == "quick" and config.backbone == "ir-tiny" for config in configs)


def test_what_is_given_twice_is_one_cell(tmp_path):
    assert len(expand(grid(tmp_path, defenses="none,none", seeds="0, 1,0"))) == 2


def test_options_of_all_and_of_one(tmp_path):
    request = grid(
        tmp_path,
        defenses="fixed-subset,partialface",
        attacks="unet,linear",
        seeds="0",
        defense_options=["partialface.subset-size=9", "fixed-subset.channels=1,2"],
        attack_options=["unet.images=128", "flip=no"],
    )
    options = {
        (config.defense, config.attack): (config.defense_options, config.attack_options) for config in expand(request)
    }
    assert options == {
        ("fixed-subset", "unet"): ({"channels": "1,2"}, {"images": "128", "flip": "no"}),
        ("fixed-subset", "linear"): ({"channels": "1,2"}, {"flip": "no"}),
        ("partialface", "unet"): ({"subset_size": "9"}, {"images": "128", "flip": "no"}),
        ("partialface", "linear"): ({"subset_size": "9"}, {"flip": "no"}),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", {"traffic": 9, "rank": 3}),
        ("unet-ensemble", {"traffic": 9, "most": 2}),
        ("linear,unet-ensemble", {"traffic": 9, "linear": {"rank": 3}, "unet_ensemble": {"most": 2}}),
    ],
)
def test_options_of_one_attack_and_of_several(name, expected):
    options = {"traffic": 9, "linear": {"rank": 3}, "unet_ensemble": {"most": 2}}
    assert addressed(options, name, ["linear", "unet-ensemble", "linear,unet-ensemble"]) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("partialface", {"bits": 2, "views": 1}),
        ("partialface+quantise", {"bits": 2, "partialface": {"views": 1}, "quantise": {"dither": "uniform"}}),
    ],
)
def test_options_of_a_member_reach_every_chain_that_has_it(name, expected):
    options = {"bits": 2, "partialface": {"views": 1}, "quantise": {"dither": "uniform"}}
    assert addressed(options, name, ["partialface", "partialface+quantise"]) == expected


FILE = """
preset = "quick"
seed = 5
[defense_options]
subset_size = 3
[sweep]
defenses = ["partialface"]
attacks = ["unet", "linear"]
seeds = [3, 4]
jobs = 2
[sweep.defense_options.partialface]
subset_size = 9
[sweep.attack_options.unet]
images = 128
"""


def test_flag_beats_environment_beats_table_beats_the_rest_of_the_file(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(FILE)

    def cells(**changes):
        return expand(grid(tmp_path, file=file, **{"defenses": None, "attacks": None, "seeds": None, **changes}))

    by_table = cells()
    assert [(config.seed, config.attack, config.attack_options) for config in by_table] == [
        (3, "unet", {"images": 128}),
        (3, "linear", {}),
        (4, "unet", {"images": 128}),
        (4, "linear", {}),
    ]
    assert {config.defense_options["subset_size"] for config in by_table} == {9}
    assert {config.seed for config in cells(environment={"BENCH_SEED": "8"})} == {8}
    assert {config.seed for config in cells(environment={"BENCH_SEED": "8"}, seeds="7")} == {7}
    by_flag = cells(defense_options=["subset_size=4"])
    assert {config.defense_options["subset_size"] for config in by_flag} == {"4"}
    by_name = cells(defense_options=["subset_size=4", "partialface.subset_size=5"])
    assert {config.defense_options["subset_size"] for config in by_name} == {"5"}
    assert grid(tmp_path, file=file, defenses=None).options.jobs == 2
    assert grid(tmp_path, file=file, jobs=3).options.jobs == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defenses": None}, "needs --defenses and --attacks"),
        ({"defenses": "none,"}, "single commas"),
        ({"seeds": "0,one"}, "seeds"),
        ({"seeds": "-1"}, "seeds"),
        ({"knowledge": "psychic"}, "knowledge"),
        ({"engine": "slurm"}, "engine"),
        ({"jobs": 0}, "jobs"),
        ({"retries": -1}, "retries"),
        ({"workers": 2}, "unknown key 'workers'"),
        ({"address": "auto"}, "need --engine ray"),
        ({"engine": "ray", "jobs": 2}, "jobs is for --engine local"),
        ({"engine": "ray", "gpus_per_cell": 1.5}, "whole number"),
        ({"attack_options": ["unet.images"]}, "write key=value"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        grid(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_options_for_something_that_is_not_swept():
    with pytest.raises(ValueError, match="'blur', which is not in the sweep"):
        SweepOptions(defenses=["none"], attacks=["unet"], defense_options={"blur": {"sigma": 2}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defenses": "none,partialfase"}, "did you mean 'partialface'"),
        ({"attacks": "unet,u-net"}, "unknown attack 'u-net'"),
        ({"defense_options": ["subset_size=9"]}, "unknown key 'subset_size'"),  # `none` has no such option
        ({"defense_options": ["partialfase.subset_size=9"]}, "unknown key 'partialfase'"),
        ({"flags": {"backbone": "ir-19"}}, "none of the 4 cells can be run: unknown backbone 'ir-19'"),
        ({"flags": {"device": "gpu"}}, "unknown device"),
        ({"flags": {"budget": "colours=1,2"}}, "no axis 'colours'"),
    ],
)
def test_a_mistake_refuses_the_sweep(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        check(expand(grid(tmp_path, **changes)))


def test_a_missing_evaluator_refuses_the_sweep(tmp_path):
    with pytest.raises(MissingError, match=r"no\.onnx does not exist"):
        check(expand(grid(tmp_path, flags={"evaluator": tmp_path / "no.onnx"})))


def test_pairs_that_do_not_go_together_are_refused_cells(tmp_path):
    cells = check(expand(grid(tmp_path, attacks="unet,unet-ensemble", knowledge="whitebox,blackbox", seeds="0")))
    refused = {(cell.config.attack, cell.config.knowledge): cell.refusal for cell in cells if cell.refusal}
    assert set(refused) == {("unet-ensemble", "blackbox")}
    assert "does not grant" in str(refused["unet-ensemble", "blackbox"])
    state = next(cell for cell in cells if cell.refusal).state()
    assert (state.status, state.error) == ("refused", str(refused["unet-ensemble", "blackbox"]))
    # An axis that only one of the attacks has.
    cells = check(expand(grid(tmp_path, attacks="unet,linear", seeds="0", flags={"budget": "steps=64,128"})))
    assert {cell.config.attack for cell in cells if cell.refusal} == {"linear"}


@pytest.fixture
def linear_refuses_blur(monkeypatch):
    linear = plugins.attacks().get("linear")
    monkeypatch.setattr(
        linear, "inapplicable", lambda self, defense: "it is not linear" if defense.name == "blur" else None
    )


@pytest.mark.usefixtures("linear_refuses_blur")
def test_an_attack_that_cannot_work_on_a_defence_is_not_applicable(tmp_path):
    cells = check(expand(grid(tmp_path, defenses="blur,none", attacks="linear", seeds="0")))
    assert [cell.state().status for cell in cells] == ["not applicable", "pending"]
    assert "linear does not apply to defence blur: it is not linear" in cells[0].state().error


@pytest.mark.usefixtures("linear_refuses_blur")
def test_of_several_attacks_those_that_cannot_work_are_left_out_with_their_options(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        '[sweep]\ndefenses = ["blur", "none"]\nattacks = ["linear,unet"]\n'
        "[attack_options]\nrank = 9\nflip = false\n"
        "[attack_options.linear]\ntraffic = 99\n[attack_options.unet]\nimages = 64\n"
    )
    blur, none = check(expand(grid(tmp_path, file=file, defenses=None, attacks=None, seeds="0")))
    assert (blur.config.attack, none.config.attack) == ("unet", "linear,unet")
    assert blur.config.attack_options == {"flip": False, "unet": {"images": 64}}
    assert none.config.attack_options == {"rank": 9, "flip": False, "linear": {"traffic": 99}, "unet": {"images": 64}}
    assert (list(blur.left_out), dict(none.left_out)) == (["linear"], {})
    assert "it is not linear" in blur.state().left_out["linear"]
    assert blur.state().status == "pending"


def test_one_defence_under_several_options(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        '[sweep]\ndefenses = ["blur"]\nattacks = ["unet"]\n'
        '[[sweep.variants]]\ndefense = "blur"\noptions = { sigma = 1.5 }\n'
        '[[sweep.variants]]\ndefense = "pixelate"\noptions = { block = 16 }\nalso = "linear"\n'
        '[[sweep.variants]]\ndefense = "peep"\nweakened = true\noptions = { components = 9 }\n'
    )
    configs = expand(grid(tmp_path, file=file, defenses=None, attacks=None, seeds="0"))
    assert [(config.defense, config.defense_options) for config in configs] == [
        ("blur", {}),
        ("blur", {"sigma": 1.5}),
        ("pixelate", {"block": 16}),
        ("peep", {**plugins.defenses().get("peep").weakened, "components": 9}),
    ]
    assert [config.attack for config in configs] == ["unet", "unet", "unet,linear", "unet"]


def test_a_device_that_only_other_machines_have_is_theirs_to_refuse(tmp_path):
    configs = expand(grid(tmp_path, flags={"device": "cuda:99"}))
    assert not any(cell.refusal for cell in check(configs, here=False))


def test_the_same_cells_are_the_same_sweep(tmp_path):
    def directory(**changes):
        return sweep_directory([Cell(config) for config in expand(grid(tmp_path, **changes))])

    assert directory() == directory(seeds="1,0", jobs=2, retries=0)
    assert directory() != directory(seeds="0,2")
    assert directory().parent == tmp_path / "sweeps"
