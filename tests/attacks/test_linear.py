import pytest
import torch
from linear_world import adversary_of, defense_of, error, faces_of, observe

from attacks.base import Observation
from attacks.linear import Linear, LinearOptions
from defenses.base import Defense
from defenses.layout import probe

SMALL = {"rank": 12, "state_faces": 120, "traffic": 240}


def fitted(make_adversary, defense, knowledge="oracle", **options):
    attack = Linear(LinearOptions(**{**SMALL, **options}))
    report = attack.learn(adversary_of(make_adversary, defense, knowledge))
    return attack, report


def test_an_open_door_is_walked_through(make_adversary):
    attack, _ = fitted(make_adversary, defense_of("none"))
    faces, observation = observe(defense_of("none"))
    assert error(attack.recover(observation), faces) < 1e-4


def test_nothing_comes_out_of_nothing_but_noise(make_adversary):
    defense = defense_of("noise", scale=1e6)
    attack, _ = fitted(make_adversary, defense)
    faces, observation = observe(defense)
    mean = attack.mean_face().float()
    assert error(attack.recover(observation), mean.expand_as(faces)) < 1e-3


def test_moderate_noise_is_measured_and_smoothed_away(make_adversary):
    defense = defense_of("noise", scale=0.1)
    attack, report = fitted(make_adversary, defense)
    assert report.details["noise"] == pytest.approx(0.1, rel=0.05)
    faces, observation = observe(defense)
    assert error(attack.recover(observation), faces) < 0.6 * error(observation.representations[:, 0], faces)


@pytest.mark.parametrize("name", ["partialface", "arcface-fd", "fixed-subset", "blur", "pixelate"])
def test_every_linear_defence_gives_more_than_the_mean_face(make_adversary, name):
    defense = defense_of(name)
    attack, _ = fitted(make_adversary, defense)
    faces, observation = observe(defense)
    mean = attack.mean_face().float().expand_as(faces)
    assert error(attack.recover(observation), faces) < 0.75 * error(mean, faces)


def test_all_channels_are_a_picture(make_adversary):
    attack, _ = fitted(make_adversary, defense_of("arcface-fd"))
    faces, observation = observe(defense_of("arcface-fd"))
    assert error(attack.recover(observation), faces) < 1e-4


def test_what_is_recovered_would_have_been_sent(make_adversary):
    defense = defense_of("partialface")
    attack, _ = fitted(make_adversary, defense)
    _, observation = observe(defense, 6)
    recovered = attack.run(observation)
    for face, sent, state in zip(recovered, observation.representations[:, 0], observation.states[:, 0], strict=True):
        operator = defense.linear_operator(state)
        again = operator(face[None]) + operator.offset
        assert float((again - sent).square().mean().sqrt()) < 1e-3 * float(sent.square().mean().sqrt())


def test_the_white_box_reads_the_states_itself(make_adversary):
    defense = defense_of("partialface")
    attack, _ = fitted(make_adversary, defense, "whitebox", state_faces=400)
    faces, observation = observe(defense, 48, states=False)
    _, told = observe(defense, 48)
    layout = probe(defense, defense.states())
    truth = layout.canonical[layout.row_of(told.states[:, 0])]
    assert float((attack.infer_layout(observation)[:, 0] == truth).all(1).float().mean()) > 0.9
    oracle, _ = fitted(make_adversary, defense, "oracle", state_faces=400)
    assert error(attack.recover(observation), faces) < 1.1 * error(oracle.recover(told), faces)


def test_the_black_box_finds_the_table_in_the_traffic(make_adversary):
    defense = defense_of("partialface", tables="random", n_permutations=2, table_seed=4)
    attack, report = fitted(make_adversary, defense, "blackbox", state_faces=400)
    assert report.details["states_found"] == len(defense.states()) == 12
    faces, observation = observe(defense, 32, states=False)
    oracle, _ = fitted(make_adversary, defense, "oracle")
    _, told = observe(defense, 32)
    assert error(attack.recover(observation), faces) < 1.25 * error(oracle.recover(told), faces)


def test_more_interceptions_leak_more(make_adversary):
    defense = defense_of("partialface")
    attack, _ = fitted(make_adversary, defense)
    errors = []
    for k in (1, 2, 8):
        faces, observation = observe(defense, 12, k)
        errors.append(error(attack.recover(observation), faces))
    assert errors[0] > errors[1] > errors[2]


def test_the_same_state_twice_is_no_news(make_adversary):
    defense = defense_of("partialface")
    attack, _ = fitted(make_adversary, defense)
    _, observation = observe(defense, 4)
    twice = Observation(observation.representations.repeat(1, 2, 1, 1, 1), observation.states.repeat(1, 2, 1))
    torch.testing.assert_close(attack.recover(twice), attack.recover(observation), rtol=0, atol=1e-6)


def test_permutations_of_a_subset_share_a_factorisation(make_adversary):
    attack, _ = fitted(make_adversary, defense_of("partialface"))
    kinds = attack.kinds()
    assert len(kinds) == 18
    assert sorted(set(kinds)) == [0, 3, 6, 9, 12, 15]


def test_a_small_memory_gives_the_same_faces(make_adversary):
    defense = defense_of("partialface")
    attack, _ = fitted(make_adversary, defense)
    _, observation = observe(defense)
    expected = attack.recover(observation)
    size = next(iter(attack._posteriors.values())).nbytes
    tight, _ = fitted(make_adversary, defense)
    tight.options = tight.options.model_copy(update={"memory": size * 1.5 / 2**20})
    torch.testing.assert_close(tight.recover(observation), expected)
    assert len(tight._posteriors) == 1


def test_conjugate_gradients_serve_a_defence_that_does_not_tell_its_factors(make_adversary):
    class Opaque:
        def __init__(self, operator):
            self._operator = operator
            self.offset = operator.offset

        def __call__(self, faces):
            return self._operator(faces)

        def adjoint(self, representation):
            return self._operator.adjoint(representation)

    class Hidden(Defense):
        name = "hidden"

        def __init__(self, inner):
            super().__init__(image_size=inner.image_size)
            self.inner = inner

        @property
        def representation_shape(self):
            return self.inner.representation_shape

        def transform(self, faces, state, generator):
            return self.inner.transform(faces, state, generator)

        def linear_operator(self, state):
            return Opaque(self.inner.linear_operator(state))

    inner = defense_of("pixelate")
    attack, _ = fitted(make_adversary, Hidden(inner))
    open_attack, _ = fitted(make_adversary, inner)
    faces, observation = observe(inner, 6)
    assert error(attack.recover(observation), faces) == pytest.approx(
        error(open_attack.recover(observation), faces), rel=0.02
    )
    forced, _ = fitted(make_adversary, Hidden(inner), solver="factor")
    with pytest.raises(ValueError, match="solver=cg"):
        forced.recover(observation)


def test_a_defence_that_is_not_linear_is_refused(make_adversary):
    class Square(Defense):
        name = "square"

        @property
        def representation_shape(self):
            return (3, self.image_size, self.image_size)

        def transform(self, faces, state, generator):
            return faces.square()

    with pytest.raises(ValueError, match="square is not a linear defence"):
        Linear().prepare(make_adversary(Square(image_size=16)))


def test_the_black_box_needs_traffic(make_adversary):
    attack = Linear(LinearOptions(**SMALL))
    with pytest.raises(ValueError, match="intercepted traffic"):
        attack.learn(make_adversary(defense_of("partialface"), "blackbox", faces=faces_of(60, 1)))
