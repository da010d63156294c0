"""Runs of template defences: the recogniser in front, the keys that are shown, and what is made of stolen records."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from onnx_models import linear_model
from tiny_runs import finished, made, pipeline, stages_of
from torch.nn import functional

from bench.errors import UsageError
from bench.images import to_float
from bench.run.attacker import AttackStages
from bench.run.templates import assess_protection, thresholds

ATTACK = {"attack": "template", "attack_options": {"width": 2, "images": 64, "batch_size": 8, "steps": 40}}
BITS = {"defense_options": {"bits": 64}}


@pytest.fixture(scope="module")
def run(out):
    """A run behind a defence of the picture, its templates stolen with their keys."""
    return finished(
        out,
        defense="fixed-subset",
        template="biohash",
        knowledge="oracle",
        queries=2,
        **ATTACK,
        defense_options={"biohash.bits": 64},
    )


def chain(out, **changes):
    return pipeline(out, defense="fixed-subset+biohash", **{**ATTACK, "defense_options": {"bits": 64}, **changes})


@pytest.mark.slow
def test_a_template_behind_a_defence_protects_the_embeddings_of_the_recogniser_trained_behind_it(run, out):
    result, directory = run
    assert result.defense.name == "fixed-subset+biohash"
    assert result.defense.representation_shape == (64, 1, 1)
    stages = stages_of(chain(out))
    defense = stages.defense(stages.config.defense, stages.config.defense_options)
    alone = stages.defense("fixed-subset", {})
    assert stages.recogniser_key(defense, "provider") == stages.recogniser_key(alone, "provider")
    assert made(directory).count("recogniser-provider-fixed-subset") == 1
    faces = to_float(stages.splits.victims.images[:5])
    sent, mirrored = (alone.protect(side, torch.Generator()).representation for side in (faces, faces.flip(-1)))
    recogniser = stages.recogniser(alone).eval()
    expected = functional.normalize(recogniser(sent) + recogniser(mirrored), dim=1)
    torch.testing.assert_close(defense.embed(faces, torch.Generator()), expected, rtol=1e-4, atol=1e-5)


def test_keys_tell_people_apart_unless_all_show_one(run):
    verified = run[0].template.verification
    accuracy = {name: row.accuracy.value for name, row in verified.items()}
    assert accuracy["own"] > accuracy["stolen"]
    assert accuracy["own"] > 0.95  # of 64 bits under other keys half agree
    assert abs(accuracy["unknown"] - 0.5) < 0.12
    assert run[0].template.replay_far_1e2.n == run[0].template.diverse_far_1e2.n


def test_stolen_keys_give_embeddings_that_pass(run):
    inversion = run[0].inversion
    assert (inversion.records, inversion.key) == (2, True)
    assert inversion.cosine.value > inversion.floor.value
    assert inversion.same_far_1e2.value is None or inversion.same_far_1e2.value > 0.5
    assert 0 <= inversion.maximal.value <= 1


def test_the_cosine_is_that_of_the_true_embeddings(run, out):
    attacks = AttackStages(stages_of(chain(out, knowledge="oracle", queries=2)))
    defense = attacks.stages.defense("fixed-subset+biohash", {"bits": 64})
    (config,) = next(iter(chain(out, knowledge="oracle", queries=2).attack_configs.values()))
    found = attacks.inverted(config, defense)
    probes, victims = attacks.selection.attacked, attacks.stages.splits.victims
    true = defense.embed(to_float(victims.images[probes]), torch.Generator())
    cosine = functional.cosine_similarity(found.first, true).mean()
    assert run[0].inversion.cosine.value == pytest.approx(float(cosine), abs=1e-4)
    assert torch.equal(victims.labels[attacks.partners], victims.labels[probes])
    kept = pd.read_parquet(run[1] / "inverted.parquet")
    assert kept["image"].tolist() == probes.tolist()
    np.testing.assert_allclose(np.stack(list(kept["first"])), found.first.numpy(), rtol=1e-4, atol=1e-5)
    assert (attacks.partners != probes).all()


@pytest.mark.parametrize(
    ("defense", "knowledge", "shown"),
    [("biohash", "whitebox", False), ("biohash", "oracle", True), ("polyprotect", "whitebox", True)],
)
def test_keys_that_lie_beside_the_templates_are_stolen_with_them(out, defense, knowledge, shown):
    cell = pipeline(out, defense=defense, knowledge=knowledge, **ATTACK)
    attacks = AttackStages(stages_of(cell))
    mechanism, attack = attacks.stages.defense(defense, {}), next(iter(cell.attack_configs.values()))[-1].make()
    observed = next(iter(attacks.observations(attack, mechanism, attacks.selection.attacked, 2))).observation
    assert (observed.keys is not None) == shown
    if observed.keys is not None:
        # Two records of a person are of two systems.
        assert not torch.equal(observed.keys[:, 0], observed.keys[:, 1])


def test_scenarios_are_scored_by_hand(out):
    stages = stages_of(pipeline(out, defense="biohash", **ATTACK, **BITS))
    defense = stages.defense("biohash", {"bits": 64})
    victims, pairs = stages.splits.victims, stages.splits.pairs
    embeddings = defense.embed(to_float(victims.images), torch.Generator())
    keys = stages.victim_keys(defense, "queries")

    def score(first, second):
        sides = (defense.enrol(embeddings[i], k, None) for i, k in ((pairs.first, first), (pairs.second, second)))
        return defense.compare(*sides)

    own = score(keys[pairs.first], keys[pairs.second])
    result = assess_protection(stages, defense)
    threshold = float(own[pairs.same].min() + own[~pairs.same].max()) / 2
    if own[pairs.same].min() > own[~pairs.same].max():
        assert result.verification["own"].accuracy.value == 1
    assert 0 < threshold < 1
    claimed = score(keys[pairs.first], keys[pairs.first])
    limit = thresholds(stages, defense)["far_1e2"]
    if isinstance(limit, float):
        accepted = float((claimed[~pairs.same] >= limit).float().mean())
        assert accepted <= 0.03  # a bit may fall otherwise in another batch


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    weights = np.random.default_rng(0).normal(size=(3 * 8 * 8, 20)).astype(np.float32)
    return linear_model(tmp_path_factory.mktemp("models") / "ours.onnx", weights, ("n", 3, 8, 8))


def test_a_recogniser_that_was_brought_along_is_used_and_none_is_trained(out, brought):
    result, directory = finished(out, defense="biohash", recogniser=brought, **ATTACK, **BITS)
    assert not any(stage.startswith("recogniser-provider") for stage in made(directory))
    assert "recogniser-brought" in made(directory)
    assert result.attack.details["gradients"] is False
    assert result.utility.accuracy.value > 0.5


def test_what_a_recogniser_of_plain_faces_cannot_do_is_refused(out, brought):
    for changes, words in (
        ({"defense": "fixed-subset", "template": "biohash"}, "3 channels of 8 x 8, and is sent 27 channels of 32 x 32"),
        ({"defense": "biohash", "teacher": brought}, "learns from no --teacher"),
        ({"defense": "biohash", "evaluator": (brought,)}, "one file"),
        ({"defense": "biohash", "template": "polyprotect"}, "can only come last"),
        ({"defense": "biohash", "template": "blurr"}, "blur"),
    ):
        with pytest.raises(UsageError, match=words):
            pipeline(out, **{"recogniser": brought, **ATTACK, **changes})
