import pytest
import torch
from interception import observe as intercept
from linear_world import adversary_of, defense_of, error, faces_of, observe
from undeclared import Affine, AffineColours, Biased, Colours, Hidden, Mixtures, Noisy, Silent, Swapped, tinted

from attacks.base import Observation
from attacks.linear import Linear, LinearOptions
from attacks.parts.states import StateReader
from bench.run.attack_config import check_coverage
from defenses.base import Defense
from defenses.layout import probe, row_numbers

SMALL = {"rank": 12, "state_faces": 120, "traffic": 240}


def fitted(make_adversary, defense, knowledge="oracle", **options):
    attack = Linear(LinearOptions(**{**SMALL, **options}))
    report = attack.learn(adversary_of(make_adversary, defense, knowledge))
    return attack, report


@pytest.fixture(scope="module")
def partialface(make_adversary):
    """A defence of 18 states, and the attack of one who is told them."""
    defense = defense_of("partialface")
    return defense, fitted(make_adversary, defense)[0]


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


@pytest.mark.parametrize("factor", [4, 3, 2, 1])
def test_small_maps_of_all_channels_are_a_picture(make_adversary, factor):
    """64 (factor / 8)^2 numbers a pixel, one at least: nothing is lost."""
    defense = defense_of("arcface-fd", upsampling=factor)
    attack, _ = fitted(make_adversary, defense)
    faces, observation = observe(defense)
    assert error(attack.recover(observation), faces) < 1e-4


def test_a_smaller_factor_leaks_less(make_adversary):
    errors = []
    for factor in (8, 4, 3, 2):
        defense = defense_of("partialface", upsampling=factor)
        attack, _ = fitted(make_adversary, defense)
        faces, observation = observe(defense)
        errors.append(error(attack.recover(observation), faces))
    assert errors == sorted(errors)
    assert errors[-1] > 1.2 * errors[0]
    assert errors[-1] < error(attack.mean_face().float().expand_as(faces), faces)


@pytest.mark.parametrize("factor", [4, 2])
def test_states_are_read_off_small_maps(make_adversary, factor):
    defense = defense_of("partialface", upsampling=factor)
    attack, report = fitted(make_adversary, defense, "whitebox", state_faces=400)
    assert report.states_read > 0.95
    _, told = observe(defense, 48)
    _, hidden = observe(defense, 48, states=False)
    truth = row_numbers(told.states[:, 0], defense.states())
    assert float((attack.infer_states(hidden)[:, 0] == truth).float().mean()) > 0.95


def test_all_channels_are_a_picture(make_adversary):
    attack, _ = fitted(make_adversary, defense_of("arcface-fd"))
    faces, observation = observe(defense_of("arcface-fd"))
    assert error(attack.recover(observation), faces) < 1e-4


def test_what_is_recovered_would_have_been_sent(partialface):
    defense, attack = partialface
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


@pytest.mark.parametrize("permutation", ["paper", "official"])
def test_the_black_box_finds_nine_numbers_in_the_traffic(make_adversary, permutation):
    """FracFace's secret, under which channels may be sent several times: the layout is read, and with it the square."""
    defense = defense_of("fracface", permutation=permutation, key_seed=4)
    reader = StateReader(adversary_of(make_adversary, defense, "blackbox"), defense.guess(torch.Generator()))
    assert reader.fit(0, LinearOptions(state_faces=60, traffic=60))["states_found"] == 1
    operators = [mechanism.linear_operator(None) for mechanism in (reader.mechanism, defense)]
    assert torch.equal(*(operator.channels for operator in operators))


def test_more_interceptions_leak_more(partialface):
    defense, attack = partialface
    errors = []
    for k in (1, 2, 8):
        faces, observation = observe(defense, 12, k)
        errors.append(error(attack.recover(observation), faces))
    assert errors[0] > errors[1] > errors[2]


def test_the_same_state_twice_is_no_news(partialface):
    defense, attack = partialface
    _, observation = observe(defense, 4)
    twice = Observation(observation.representations.repeat(1, 2, 1, 1, 1), observation.states.repeat(1, 2, 1))
    torch.testing.assert_close(attack.recover(twice), attack.recover(observation), rtol=0, atol=1e-6)


def test_permutations_of_a_subset_share_a_factorisation(partialface):
    kinds = partialface[1].kinds()
    assert len(kinds) == 18
    assert sorted(set(kinds)) == [0, 3, 6, 9, 12, 15]


def test_a_small_memory_gives_the_same_faces(partialface, make_adversary):
    defense, attack = partialface
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

    class Opaquely(Defense):
        name = "opaquely"

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
    open_attack, _ = fitted(make_adversary, inner)
    faces, observation = observe(inner, 6)
    expected = open_attack.recover(observation)
    # What it does to neighbouring pixels is found out, and factored all the same.
    attack, _ = fitted(make_adversary, Opaquely(inner))
    torch.testing.assert_close(attack.recover(observation), expected, rtol=0, atol=1e-4)
    iterated, _ = fitted(make_adversary, Opaquely(inner), solver="cg")
    assert error(iterated.recover(observation), faces) == pytest.approx(error(expected, faces), rel=0.02)


def test_a_map_that_mixes_far_pixels_cannot_be_factored(make_adversary):
    with pytest.raises(ValueError, match="solver=cg"):
        fitted(make_adversary, defense_of("pyramid", levels=3), solver="factor")


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


# -- what a defence does not say -----------------------------------------------------------------


def in_the_dark(make_adversary, defense, knowledge="whitebox", count=24, **options):
    """The attack on tinted pictures, its report, the victims and what is intercepted of them."""
    attack = Linear(LinearOptions(**{**SMALL, **options}))
    size = defense.image_size
    report = attack.learn(make_adversary(defense, knowledge, faces=tinted(240, size, 1)))
    victims = tinted(count, size, 50)
    return attack, report, victims.float() / 255, intercept(defense, victims, states=knowledge == "oracle", seed=3)


@pytest.mark.parametrize("kind", [Colours, Mixtures])
def test_states_that_differ_in_colour_alone_are_read_by_likelihood(make_adversary, kind):
    defense = kind(image_size=24)
    attack, report, faces, observation = in_the_dark(make_adversary, defense)
    told, _, _, known = in_the_dark(make_adversary, defense, "oracle")
    assert error(told.recover(known), faces) < 0.01
    assert error(attack.recover(observation), faces) == pytest.approx(error(told.recover(known), faces), abs=2e-3)
    assert torch.equal(attack.infer_states(observation)[:, 0].cpu(), known.states[:, 0, 0])
    assert report.details["linearity"] == "declared"
    assert report.states_read == 1
    assert check_coverage(report, defense, "whitebox") is True


def test_states_that_cannot_be_told_apart_are_not_called_covered(make_adversary):
    class Half(Colours):
        """Either half of the pixels negated: of pictures whose pixels have any sign, nobody can say which."""

        name = "half"

        @staticmethod
        def matrices(drawn):
            signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * 3)
            return torch.diag_embed(signs)

        def transform(self, faces, state, generator):
            return super().transform(faces - 0.5, state, generator)

        def linear_operator(self, state):
            operator = super().linear_operator(state)
            operator.offset = operator(torch.full((1, 3, 1, 1), -0.5))[0]
            return operator

    defense = Half(image_size=24)
    faces = (torch.rand(240, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    report = Linear(LinearOptions(**SMALL)).learn(make_adversary(defense, faces=faces))
    assert report.states_read < 0.5
    assert check_coverage(report, defense, "whitebox") is False


@pytest.mark.parametrize("kind", [Silent, Hidden])
def test_a_silent_defence_gives_as_much_as_one_that_declares_itself(make_adversary, kind):
    attack, report, faces, observation = in_the_dark(make_adversary, kind(image_size=24))
    open_attack, _, _, known = in_the_dark(make_adversary, defense_of("partialface"), "oracle")
    assert report.details["linearity"] == "undeclared, but linear"
    assert (report.details["states_found"], report.states_seen) == (18, None)
    assert report.details["state_accuracy"] > 0.97
    assert error(attack.recover(observation), faces) < 1.05 * error(open_attack.recover(known), faces)
    assert len(set(attack.kinds())) == 6  # permutations of a subset say the same, declared or not


@pytest.mark.slow
def test_colours_in_any_order_and_inverted_come_back(make_adversary):
    attack, report, faces, observation = in_the_dark(make_adversary, Swapped(image_size=24), rank=40)
    assert report.details["states_found"] == 96
    # On which side a picture was is anybody's guess: these have no face's symmetry.
    recovered = attack.recover(observation)
    errors = torch.stack([(side - faces).square().mean(dim=(1, 2, 3)) for side in (recovered, recovered.flip(-1))])
    assert float((errors.amin(dim=0) < 1e-6).float().mean()) > 0.9


@pytest.mark.parametrize(("kind", "bound"), [(Biased, 0.5), (Affine, 0.5), (AffineColours, 0.6)])
def test_what_is_added_and_multiplied_per_face_hides_no_more_than_level_and_contrast(make_adversary, kind, bound):
    attack, _, faces, observation = in_the_dark(make_adversary, kind(image_size=24))
    recovered = attack.recover(observation)

    def shape(pictures):
        centred = pictures - pictures.mean(dim=(2, 3), keepdim=True)
        return centred / centred.std(dim=(2, 3), keepdim=True)

    torch.testing.assert_close(shape(recovered), shape(faces), rtol=0, atol=0.02)
    assert error(recovered, faces) < bound * error(attack.mean_face().float().expand_as(faces), faces)


def test_undeclared_noise_is_measured_and_smoothed_away(make_adversary):
    attack, report, faces, observation = in_the_dark(make_adversary, Noisy(image_size=24))
    assert report.details["noise"] == pytest.approx(0.05, rel=0.05)
    assert error(attack.recover(observation), faces) < 0.7 * error(observation.representations[:, 0], faces)


def test_layouts_and_likelihood_read_the_same_states(make_adversary):
    defense = defense_of("partialface")
    attack, report, _, observation = in_the_dark(make_adversary, defense, state_faces=400)
    _, _, _, known = in_the_dark(make_adversary, defense, "oracle")
    truth = row_numbers(known.states[:, 0], defense.states())
    assert report.states_read > 0.95
    attack.by_likelihood.fill_(True)
    assert float((attack.rows(observation)[:, 0] == truth).float().mean()) > 0.95
    attack.by_likelihood.fill_(False)
    assert float((attack.rows(observation)[:, 0] == truth).float().mean()) > 0.9


def test_channels_that_are_left_out_are_no_observation(make_adversary):
    defense = defense_of("fixed-subset+dropout", share=0.25)
    attack, report = fitted(make_adversary, defense, iterations=40)
    assert int(attack.seen.sum()) == 20
    assert report.details["channels_seen"] == 20
    assert float(attack.noise) < 1e-5  # what is missing is no noise
    faces, observation = observe(defense, 8)
    recovered = attack.recover(observation)
    whole, _ = fitted(make_adversary, defense_of("fixed-subset"))
    _, everything = observe(defense_of("fixed-subset"), 8)
    mean = attack.mean_face().float().expand_as(faces)
    assert error(whole.recover(everything), faces) < error(recovered, faces) < 0.85 * error(mean, faces)
    attack.seen.fill_(1)
    assert error(recovered, faces) < 0.7 * error(attack.recover(observation), faces)  # zeros taken for values


def test_of_several_interceptions_each_shows_other_channels(make_adversary):
    defense = defense_of("dropout", number=1)  # a colour at a time
    attack, _ = fitted(make_adversary, defense, iterations=40)
    errors = []
    for k in (1, 3):
        faces, observation = observe(defense, 8, k)
        errors.append(error(attack.recover(observation), faces))
    assert errors[1] < 0.5 * errors[0]


def test_a_chain_is_inverted_with_its_rounding_as_noise(make_adversary):
    errors = []
    for bits in (8, 2):
        defense = defense_of("fixed-subset+quantise", low=-4, high=4, bits=bits)
        attack, report = fitted(make_adversary, defense)
        faces, observation = observe(defense)
        errors.append(error(attack.recover(observation), faces))
        assert report.details["noise"] > 0.2 * 8 / (2**bits - 1) / 12**0.5
    alone, _ = fitted(make_adversary, defense_of("fixed-subset"))
    faces, observation = observe(defense_of("fixed-subset"))
    assert error(alone.recover(observation), faces) < 1.02 * errors[0] < errors[1]


def test_black_boxes_find_the_table_behind_a_chain(make_adversary):
    defense = defense_of("partialface+noise", **{"noise.scale": 1e-4, "tables": "random", "n_permutations": 2})
    _, report = fitted(make_adversary, defense, "blackbox", state_faces=400)
    assert report.details["states_found"] == 12
