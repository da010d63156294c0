"""Which attacks a run consists of, and with what options, as they are written in different places."""

import pytest

from bench.errors import UsageError
from bench.run.attack_config import attack_configs
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


def test_a_budget_is_spent_by_every_attack():
    spent = configs("linear,unet", budget="k=1,2")
    assert {name: [config.interceptions for config in budgets] for name, budgets in spent.items()} == {
        "linear": [1, 2],
        "unet": [1, 2],
    }
    with pytest.raises(UsageError, match=r"linear has no axis 'steps' \(axes: data, k"):
        configs("unet,linear", budget="steps=1,2")
