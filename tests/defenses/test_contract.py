"""What every defence of the package keeps to, whatever it does."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import math
import pkgutil
from contextlib import nullcontext

import pytest
import torch
from pictures import generator
from pydantic import ValidationError

import defenses
from defenses.base import Defense, SeparableSum
from defenses.template import TemplateDefense

MODULES = sorted(
    module.name for module in pkgutil.iter_modules(defenses.__path__) if module.name not in defenses.SUPPORT_MODULES
)
SIZE = 24

#: Options under which what is random, and not added to a linear map, is absent or as small as it can be.
HARDLY_NOISY = {"quantise": {"bits": 16}, "dropout": {"number": 0}}


def _defined_in(module_name):
    module = importlib.import_module(f"defenses.{module_name}")
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Defense)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]


CLASSES = [cls for name in MODULES for cls in _defined_in(name)]


def _faces(count=5, dtype=torch.float32):
    return torch.rand(count, 3, SIZE, SIZE, generator=generator(9)).to(dtype)


@pytest.fixture(scope="session")
def fitted(ready):
    """A defence of each class with its defaults, as preset quick has them, made ready once."""
    return functools.cache(lambda cls: ready(cls(cls.Options(**cls.presets.get("quick", {})), image_size=SIZE)))


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.name)
def defense(request, fitted):
    """Each defence, fitted if it is trainable, with a recogniser if it needs one."""
    return copy.deepcopy(fitted(request.param))


def _same_draws(defense, generator):
    """States and keys for the five faces, to pin."""
    return {"state": defense.draw(5, generator), "keys": defense.draw_keys(5, generator)}


def test_the_required_defences_are_there():
    names = {cls.name for cls in CLASSES}
    assert names >= {"none", "pixelate", "blur", "noise", "arcface-fd", "fixed-subset", "partialface"}
    assert {cls.level for cls in CLASSES} == {"image", "feature", "template"}


@pytest.mark.parametrize("module", MODULES)
def test_one_defence_per_file_named_after_it(module):
    (cls,) = _defined_in(module)
    assert cls.name.replace("-", "_") == module
    assert cls.summary
    assert "\n" not in cls.summary


def test_representation(defense):
    faces = _faces()
    before = faces.clone()
    protected = defense.protect(faces, generator())
    assert tuple(protected.representation.shape) == (5, *defense.representation_shape)
    assert protected.representation.dtype == torch.float32
    assert torch.isfinite(protected.representation).all()
    assert defense.channels == protected.representation.shape[1]
    assert torch.equal(faces, before)  # the caller's faces are left alone
    assert not protected.representation.requires_grad
    assert defense.protect(_faces(2, torch.float64), generator()).representation.dtype == torch.float64
    assert tuple(defense.protect(_faces(0), generator()).representation.shape) == (0, *defense.representation_shape)


def test_what_is_called_pure_is(defense):
    if not getattr(defense.transform, "pure", False):
        pytest.skip("is shielded")
    kept = [*defense.buffers(), *defense.parameters()]
    state = defense.draw(5, generator())
    for faces in (_faces(), torch.zeros(5, 3, SIZE, SIZE), torch.ones(5, 3, SIZE, SIZE)):
        given = [faces, *kept, *([] if state is None else [state])]
        before = [tensor.clone() for tensor in given]
        first = defense.transform(faces, state, generator())
        value = first.clone()
        second = defense.transform(faces, state, generator())
        assert torch.isfinite(first).all()
        assert all(torch.equal(was, now) for was, now in zip(before, given, strict=True))
        memory = [tensor.untyped_storage().data_ptr() for tensor in (first, second, *given)]
        assert memory.count(memory[0]) == memory.count(memory[1]) == 1
        second.zero_()
        assert torch.equal(first, value)
        assert torch.equal(defense.transform(faces, state, generator()), value)


def test_parts(defense):
    representation = defense.protect(_faces(), generator()).representation
    parts = defense.unpack(representation)
    assert {name: tuple(part.shape[1:]) for name, part in parts.items()} == defense.parts
    assert torch.equal(defense.pack(parts), representation)  # nothing beside the parts is sent
    if isinstance(defense, TemplateDefense):
        return  # each codes what it stores in its own way, and may count a key beside it
    values = sum(part[0].numel() for part in parts.values())
    # Bits are sent as bits, levels as their numbers, and of maps of zeros that they are.
    bits = defense.options.bits if defense.name == "quantise" else 1 if parts_are_bits(parts) else 32
    left_out = (representation[0] == 0).all(dim=2).all(dim=1)
    values -= int(left_out.sum()) * representation[0, 0].numel()
    assert defense.bytes_per_face() == math.ceil(values * bits / 8) + math.ceil(
        bool(left_out.any()) * len(left_out) / 8
    )


def parts_are_bits(parts):
    return all(len(part.unique()) == 2 for part in parts.values())


def test_what_is_drawn_is_not_sent(defense):
    """No value that is sent follows a column of states or keys, and none of the secret's tables stands in it."""
    protected = defense.protect(_faces(), generator())
    sent = protected.representation.flatten(1).double()
    for drawn in (protected.state, protected.keys):
        for column in [] if drawn is None else drawn.double().unbind(1):
            if len(column.unique()) > 1:
                assert not (sent == column[:, None]).all(dim=0).any()
    for table in defense.secret.values():
        values = table.double().flatten().unique()
        assert not any(torch.isin(values, face).all() for face in sent)


def test_faces_do_not_see_each_other(defense):
    draws = _same_draws(defense, generator(1))
    order = torch.tensor([3, 0, 4, 2, 1])
    first = defense.protect(_faces(), generator(2), **draws).representation
    if not torch.equal(first, defense.protect(_faces(), generator(3), **draws).representation):
        pytest.skip("adds noise that is no state")
    turned = {name: None if drawn is None else drawn[order] for name, drawn in draws.items()}
    second = defense.protect(_faces()[order], generator(2), **turned).representation
    torch.testing.assert_close(second, first[order], rtol=1e-5, atol=1e-5)


def test_the_generator_decides_and_nothing_else_is_drawn_from(defense):
    torch.manual_seed(0)
    first = defense.protect(_faces(), generator(3))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = defense.protect(_faces(), generator(3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(again.representation, first.representation)
    for name in ("state", "keys"):
        drawn = [getattr(protected, name) for protected in (first, again)]
        assert drawn == [None, None] or torch.equal(*drawn)


def test_states(defense):
    drawn = defense.draw(64, generator())
    states = defense.states()
    if drawn is None:
        assert states is None
        assert defense.entropy_bits == 0
        return
    assert (drawn.dtype, drawn.device.type, len(drawn)) == (torch.int64, "cpu", 64)
    if states is not None:
        listed = {tuple(row) for row in states.tolist()}
        assert len(listed) == len(states)
        assert {tuple(row) for row in drawn.tolist()} <= listed
        assert 2**defense.entropy_bits == pytest.approx(len(states))


def test_a_pinned_state_is_used(defense):
    draws = generator(1)
    drawn = defense.draw(5, draws)
    if drawn is None:
        pytest.skip("draws no state")
    first = defense.protect(_faces(), draws, state=drawn)  # noise is drawn after the state
    assert torch.equal(first.state, drawn)
    assert torch.equal(first.representation, defense.protect(_faces(), generator(1)).representation)


def test_differentiable_in_the_faces(defense):
    if not defense.differentiable:
        pytest.skip("declares no gradient")
    faces = _faces().requires_grad_()
    defense.protect(faces, generator()).representation.square().sum().backward()
    assert faces.grad is not None
    assert torch.isfinite(faces.grad).all()
    assert float(faces.grad.abs().max()) > 0


def test_linear_operator_is_the_transform(defense):
    state = defense.draw(1, generator(4))
    operator = defense.linear_operator(None if state is None else state[0])
    if operator is None:
        pytest.skip("not linear")
    if defense.name in HARDLY_NOISY:
        options = defense.Options(**HARDLY_NOISY[defense.name])
        defense = type(defense)(options, image_size=defense.image_size)
    faces = _faces(3, torch.float64)
    states = None if state is None else state.expand(3, -1)

    linear = slice(None) if defense.linear_channels is None else defense.linear_channels

    def protected(shown, seed):
        return defense.protect(shown, generator(seed), state=states).representation[:, linear]

    sent, black = protected(faces, 0), protected(torch.zeros_like(faces), 0)
    rounding = 1e-9 + 1e-13 * float(sent.abs().max()) + (2**-16 if defense.name == "quantise" else 0)
    torch.testing.assert_close(operator(faces), sent - black, rtol=0, atol=rounding)  # noise is drawn alike for both
    black = torch.cat([protected(torch.zeros_like(faces), seed) for seed in range(20)])
    off, error = black.mean(dim=0) - operator.offset, black.std(dim=0) / math.sqrt(len(black))
    exact = error < 1e-9
    torch.testing.assert_close(off[exact], torch.zeros_like(off[exact]), rtol=0, atol=1e-9)
    assert exact.all() or float((off / error)[~exact].square().mean()) < 3  # of the mean of a noise, this is about 1
    assert operator(faces.float()).dtype == torch.float32
    z = torch.randn(sent.shape, generator=generator(), dtype=torch.float64)
    back = operator.adjoint(z)
    assert back.shape == faces.shape
    assert float((operator(faces) * z).sum()) == pytest.approx(float((faces * back).sum()), rel=1e-9)


def test_a_separable_sum_is_what_its_factors_say(defense):
    state = defense.draw(1, generator(4))
    operator = defense.linear_operator(None if state is None else state[0])
    if not isinstance(operator, SeparableSum):
        pytest.skip("does not tell its factors")
    faces = _faces(2, torch.float64)
    planes = torch.einsum("pc,nchw->nphw", operator.colour, faces)
    expected = torch.einsum("kih,nphw,kjw->npkij", operator.row_factors, planes, operator.column_factors)
    torch.testing.assert_close(operator(faces), expected.flatten(1, 2), rtol=0, atol=1e-9)


def test_canonical_keeps_the_size(defense):
    protected = defense.protect(_faces(), generator())
    canonical = defense.canonical(protected.representation, protected.state)
    assert canonical.shape[0] == 5
    assert canonical.shape[2:] == protected.representation.shape[2:]
    if protected.state is not None and defense.states() is None:
        # Too many states to list: a mixture, of which a small change changes as much as it weighs.
        moved = defense.canonical(protected.representation + 1, protected.state) - canonical
        assert (moved.abs().amax(dim=1) > 0).all()
        return
    # Nothing is lost or made up.
    torch.testing.assert_close(canonical.abs().sum(), protected.representation.abs().sum())


def test_a_guess_has_another_secret_and_the_same_interface(defense):
    guess = defense.guess(generator(7))
    assert guess.representation_shape == defense.representation_shape
    if not defense.secret:
        assert guess is defense
        return
    assert guess is not defense
    shapes, theirs = ({name: value.shape for name, value in side.secret.items()} for side in (guess, defense))
    assert shapes == theirs

    def same(other):
        return all(torch.equal(guess.secret[name], value) for name, value in other.secret.items())

    assert same(defense.guess(generator(7)))
    assert not same(defense)
    assert not same(defense.guess(generator(8)))


def test_describe_is_json(defense):
    described = json.loads(json.dumps(defense.describe()))
    assert described["name"] == defense.name
    # The options written to a result rebuild the defence.
    rebuilt = type(defense)(defense.Options(**described["options"]), image_size=SIZE)
    if isinstance(rebuilt, TemplateDefense):
        rebuilt.attach(defense.recogniser, defense.embedding_size)
    assert rebuilt.describe() == defense.describe()


def test_state_dict_loads_into_a_fresh_one(defense):
    fresh = type(defense)(defense.options, image_size=SIZE).eval()
    if isinstance(fresh, TemplateDefense):
        fresh.attach(defense.recogniser, defense.embedding_size)
    fresh.load_state_dict(defense.state_dict())
    first, second = (side.protect(_faces(), generator()).representation for side in (fresh, defense))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("faces", "message"),
    [
        (torch.zeros(2, 3, SIZE, SIZE + 1), "expects faces"),
        (torch.zeros(2, 1, SIZE, SIZE), "expects faces"),
        (torch.zeros(3, SIZE, SIZE), "expects faces"),
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), "float"),
        (torch.full((2, 3, SIZE, SIZE), 255.0), r"\[0, 1\]"),
        (torch.full((2, 3, SIZE, SIZE), -1.0), r"\[0, 1\]"),
        (torch.full((2, 3, SIZE, SIZE), float("nan")), r"\[0, 1\]"),
    ],
)
def test_bad_faces_are_refused(defense, faces, message):
    with pytest.raises(ValueError, match=message):
        defense.protect(faces, generator())


def test_options_are_frozen_and_known(defense):
    with pytest.raises(ValidationError, match="no_such_option"):
        defense.Options(no_such_option=1)
    for name in type(defense.options).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(defense.options, name, getattr(defense.options, name))


def test_too_small_an_image_is_refused(defense):
    with pytest.raises(ValueError, match="at least 8"):
        type(defense)(image_size=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda faces: faces.mul_(0.5), None),  # in place: the caller's faces are left alone
        (lambda faces: faces / 0, "careless made representations that are not finite"),
        (lambda faces: faces[:, :1], r"careless made representations \(2, 1, 24, 24\), it declares \(2, 3, 24, 24\)"),
        (lambda faces: faces[:1], r"careless made representations \(1, 3, 24, 24\)"),
        (lambda faces: None, "careless made representations that are no tensor: NoneType"),
    ],
)
def test_a_careless_defence_is_named_and_harms_nobody(change, message):
    class Careless(Defense):
        name = "careless"

        def transform(self, faces, state, generator):
            return change(faces)

    faces = _faces(2)
    before = faces.clone()
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        Careless(image_size=SIZE).protect(faces, generator())
    assert torch.equal(faces, before)


def test_each_face_can_have_a_generator_of_its_own(defense):
    """A face is protected alike in whatever company, and each client keeps the key that it is given."""
    generators = [generator(seed) for seed in range(5)]
    together = defense.protect_each(_faces(), generators)
    alone = defense.protect_each(_faces()[3:4], [generator(3)])
    torch.testing.assert_close(together.representation[3:4], alone.representation, rtol=1e-5, atol=1e-5)
    if together.keys is not None:
        again = defense.protect_each(_faces(), [generator(9)] * 5, keys=together.keys)
        assert again.keys is together.keys
        assert torch.equal(again.representation, together.representation)


def test_embeddings_that_may_be_behind_a_template_are_judged_one_by_one(defense):
    if not isinstance(defense, TemplateDefense):
        pytest.skip("stores no template")
    drawn = torch.randn(3, 5, defense.embedding_size, generator=generator(1))
    embeddings = torch.nn.functional.normalize(drawn, dim=2)
    keys = defense.draw_keys(3, generator(2))
    misfit = defense.misfit(defense.enrol(embeddings[:, 0], keys, generator(3)), keys)
    together = misfit(embeddings)
    assert together.shape == (3, 5)
    assert together.argmin(dim=1).tolist() == [0, 0, 0]  # which made it
    for number in range(5):
        torch.testing.assert_close(together[:, [number]], misfit(embeddings[:, [number]]))
