"""Which attacks a composite one consists of, as its options are written in different places."""

import pytest
from pydantic import ValidationError

from bench.run.attack_config import Composite, CompositeOptions


def members(**options):
    return Composite(CompositeOptions.model_validate(options)).members()


@pytest.mark.parametrize("attacks", ["linear, other-one", ["linear", "other-one"], ("linear", "other-one")])
def test_attacks_keep_their_order(attacks):
    assert members(attacks=attacks) == (("linear", {}), ("other-one", {}))


def test_options_reach_the_attack_they_name():
    expected = (("linear", {"rank": "200"}), ("other-one", {"steps": 3, "images": 4}))
    assert members(attacks="linear,other-one", linear={"rank": "200"}, other_one={"steps": 3, "images": 4}) == expected
    nested = {"linear": {"rank": "200"}, "other-one": {"steps": 3, "images": 4}}
    assert members(attacks="linear,other-one", options=nested) == expected
    # What was set in a file, and one more on the command line.
    mixed = members(attacks="linear,other-one", options={"linear": {"rank": "100", "k": 1}}, linear={"rank": "200"})
    assert mixed[0] == ("linear", {"rank": "200", "k": 1})


def test_stored_options_are_read_back():
    options = CompositeOptions.model_validate({"attacks": "a,b", "b": {"x": "1"}})
    assert CompositeOptions.model_validate(options.model_dump(mode="json")) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "attacks"),
        ({"attacks": "linear"}, "at least 2"),
        ({"attacks": "linear,linear"}, "named twice"),
        ({"attacks": "linear,unet", "images": "3"}, "Extra inputs"),
        ({"attacks": "linear,unet", "posterior": {"steps": 3}}, "Extra inputs"),
        ({"attacks": "linear,unet", "options": {"posterior": {"steps": 3}}}, "for posterior, not one of"),
        ({"attacks": "linear,unet", "unet": "3"}, "unet.OPTION=VALUE"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        CompositeOptions.model_validate(options)


def test_it_is_never_fitted_itself():
    attack = Composite(CompositeOptions(attacks=("a", "b")))
    with pytest.raises(TypeError, match="fit its members"):
        attack.fit(None)
    with pytest.raises(TypeError, match="prepare its members"):
        attack.prepare(None)
