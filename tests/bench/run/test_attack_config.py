"""Which attacks a run consists of, and with what options, as they are written in different places."""

from typing import ClassVar

import pytest

from bench import plugins
from bench.errors import UsageError
from bench.run.attack_config import AttackConfig, attack_configs
from bench.run.config import resolve


def configs(attack, options=None, **settings):
    asked = {"defense": "none", "attack": attack, "attack_options": options or {}, **settings}
    return attack_configs(resolve(asked, {}))


def options_of(attack, **options):
    return {name: dict(budgets[-1].options) for name, budgets in configs(attack, options).items()}


def test_attacks_keep_their_order():
    assert list(configs("unet, linear,hill-climb")) == ["unet", "linear", "hill-climb"]


def test_an_option_reaches_the_attack_it_names_or_all_that_have_it():
    options = {"images": "500", "unet": {"images": "900"}, "hill_climb": {"starts": 2}}
    assert options_of("linear,unet,hill-climb", **options) == {
        "linear": {},
        "unet": {"images": "900"},
        "hill-climb": {"starts": 2},
    }
    assert options_of("unet,unrolled", images="500") == {"unet": {"images": "500"}, "unrolled": {"images": "500"}}


def test_one_attack_says_itself_which_options_it_has():
    (unet,) = configs("unet", {"imagse": "3"}).values()
    with pytest.raises(UsageError, match="unknown key 'imagse'"):
        unet[-1].make()


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        ("linear,linear", {}, "each attack once"),
        ("linear,", {}, "each attack once"),
        ("linear,unet", {"imagse": "3"}, "-a imagse: none of linear, unet has such an option"),
        ("linear,unet", {"unrolled": {"steps": 3}}, "-a unrolled: none of"),
        ("linear,unet", {"unet": "3"}, "unet.OPTION=VALUE"),
        ("linear,u-net", {"images": "3"}, "unknown attack 'u-net'"),
    ],
)
def test_what_does_not_go_together_is_refused(attack, options, message):
    with pytest.raises(UsageError, match=message):
        configs(attack, options)


UNET = {"defense": "none", "attack": "unet"}


def test_without_a_budget_there_is_one_configuration():
    config = resolve({**UNET, "queries": 3, "attack_options": {"images": "77"}}, {})
    assert attack_configs(config) == {"unet": [AttackConfig("unet", "cpu", {"images": "77"}, interceptions=3)]}


class TestBudgets:
    @pytest.fixture(autouse=True)
    def _axis(self, monkeypatch):
        class Stepping(plugins.attacks().get("unet")):
            budgets: ClassVar = {"steps": "images"}

        monkeypatch.setitem(plugins.attacks()._loaded, "unet", Stepping)

    def test_the_last_is_the_runs_own(self):
        config = resolve({**UNET, "budget": "steps=100,200", "attack_options": {"widths": "4,8"}}, {})
        first, last = attack_configs(config)["unet"]
        assert first.make().options.images == 100
        assert last.make().options.images == 200
        assert last.make().options.widths == first.make().options.widths == (4, 8)
        config = resolve({**UNET, "budget": "data=0.5,1", "queries": 2}, {})
        assert [(c.public, c.interceptions) for c in attack_configs(config)["unet"]] == [(0.5, 2), (1, 2)]
        config = resolve({**UNET, "budget": "k=1,4"}, {})
        assert [(c.public, c.interceptions) for c in attack_configs(config)["unet"]] == [(1, 1), (1, 4)]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"budget": "images=1,2"}, r"unet has no axis 'images' \(axes: data, k, steps\)"),
            ({"budget": "steps=1,2", "attack_options": {"images": "3"}}, "both set images of unet"),
            ({"budget": "k=1,2", "queries": 4}, "--queries 4 is not the largest"),
        ],
    )
    def test_contradictions_are_refused(self, changes, message):
        with pytest.raises(UsageError, match=message):
            attack_configs(resolve({**UNET, **changes}, {}))


def test_a_budget_is_spent_by_every_attack():
    spent = configs("linear,unet", budget="k=1,2")
    assert {name: [config.interceptions for config in budgets] for name, budgets in spent.items()} == {
        "linear": [1, 2],
        "unet": [1, 2],
    }
    with pytest.raises(UsageError, match=r"linear has no axis 'steps' \(axes: data, k"):
        configs("unet,linear", budget="steps=1,2")
