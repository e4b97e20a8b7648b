"""The parameters of a round come from the signed manifest: what is summed, who takes part, what everything is bound
to."""

import msgspec
import pytest
from support.consortium import make_consortium

from secureagg import Counts, FixedPoint, ParameterError
from secureagg.lanes import CLIPPED, WEIGHT
from secureagg.parameters import choose_thresholds
from sites import recipe
from sites.errors import ManifestError
from sites.rounds import (
    CORRECT,
    HISTOGRAM,
    PERSONAL_CORRECT,
    PERSONAL_HISTOGRAM,
    TOTAL,
    UPDATE,
    model_spec,
    round_parameters,
)

DIGEST = bytes(32)
COHORT = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """The manifest of a consortium of four."""
    return make_consortium(tmp_path_factory.mktemp("consortium")).manifest


def parameters(manifest, **changes):
    """A training round of all four, but for ``changes``."""
    asked = {"run": "run", "round_number": 1, "purpose": "train", "cohort": COHORT, "model_digest": DIGEST, **changes}
    return round_parameters(manifest, **asked)


def lanes_of(one):
    """Lane name -> lane."""
    return {name: ring_lane.lane for name, ring_lane in one.lanes.items()}


def test_lanes_of_a_training_round(manifest):
    """A training round sums the weighted update and the evaluation counts, as the manifest bounds them."""
    one = parameters(manifest)
    lanes = lanes_of(one)
    assert {UPDATE, CORRECT, TOTAL, HISTOGRAM, WEIGHT, UPDATE + CLIPPED} <= lanes.keys()
    update = lanes[UPDATE]
    assert (update.length, update.weighted) == (14, True)
    assert update.encoding == FixedPoint(value_range=2.0, value_bits=16, clip=True)
    assert one.max_weight == manifest.encoding.max_examples
    for name, length in ((CORRECT, 1), (TOTAL, 1), (HISTOGRAM, 2 * 200)):
        assert (lanes[name].length, lanes[name].weighted) == (length, False)
        assert lanes[name].encoding == Counts(maximum=manifest.evaluation.max_examples)


def test_lanes_of_an_evaluation_round(manifest):
    """An evaluation round sums the evaluation counts, and neither an update nor a weight."""
    one = parameters(manifest, purpose="evaluate")
    training = lanes_of(parameters(manifest))
    assert one.max_weight is None
    assert lanes_of(one) == {
        name: lane for name, lane in training.items() if name not in (UPDATE, WEIGHT, UPDATE + CLIPPED)
    }


@pytest.fixture(scope="module")
def personalised(tmp_path_factory):
    """The manifest of a consortium that has personal models evaluated."""
    evaluation = msgspec.structs.replace(recipe.EVALUATION, personalised=True)
    return make_consortium(tmp_path_factory.mktemp("personalised"), evaluation=evaluation).manifest


def test_lanes_of_personal_models(manifest, personalised):
    """The round after the training sums the counts of the final model and of the sites' own versions of it, of the same
    examples; in no other round of such a manifest are held-out examples counted."""
    planned = personalised.training.rounds
    lanes = lanes_of(parameters(personalised, purpose="personalise", round_number=planned + 1))
    evaluated = lanes_of(parameters(manifest, purpose="evaluate"))
    assert lanes.keys() - evaluated.keys() == {PERSONAL_CORRECT, PERSONAL_HISTOGRAM}
    assert evaluated.items() <= lanes.items()
    for ours, theirs in ((PERSONAL_CORRECT, CORRECT), (PERSONAL_HISTOGRAM, HISTOGRAM)):
        assert (lanes[ours].length, lanes[ours].encoding) == (lanes[theirs].length, lanes[theirs].encoding)
    training = lanes_of(parameters(personalised)).keys()
    assert training == lanes_of(parameters(manifest)).keys() - {CORRECT, TOTAL, HISTOGRAM}


def test_personal_models_that_nobody_signed_for(manifest, personalised):
    """They are evaluated in one round only, if the manifest says so; and then there is no other evaluation, whose
    difference to that one would be the counts of the sites that have no model of their own."""
    planned = manifest.training.rounds
    with pytest.raises(ParameterError, match="evaluated without personal ones"):
        parameters(manifest, purpose="personalise", round_number=planned + 1)
    for number in (1, planned, planned + 1):
        with pytest.raises(ParameterError, match="evaluated together with personal ones"):
            parameters(personalised, purpose="evaluate", round_number=number)
    for number in (1, planned):
        with pytest.raises(ParameterError, match=f"expected in round {planned + 1} only"):
            parameters(personalised, purpose="personalise", round_number=number)
    with pytest.raises(ParameterError, match=f"personalise: the manifest has {planned} training rounds"):
        parameters(personalised, purpose="personalise", round_number=planned + 2)


def test_no_personal_models_where_sites_are_the_unit(tmp_path):
    """A manifest that wants them in mode site cannot be made."""
    evaluation = msgspec.structs.replace(recipe.EVALUATION, personalised=True)
    training, privacy = recipe.recipe_of("site")
    with pytest.raises(ManifestError, match=r"personalised in \[evaluation\] and mode site"):
        make_consortium(tmp_path, evaluation=evaluation, training=training, privacy=privacy)


def test_values_out_of_range(manifest):
    """Whether values are clipped is what the manifest says."""
    strict = msgspec.structs.replace(
        manifest, encoding=msgspec.structs.replace(manifest.encoding, out_of_range="error", value_bits=12)
    )
    lanes = lanes_of(parameters(strict))
    assert lanes[UPDATE].encoding == FixedPoint(value_range=2.0, value_bits=12, clip=False)
    assert UPDATE + CLIPPED not in lanes


def test_the_tensors_of_the_manifest(manifest):
    """The update has the length and the order of the manifest's tensors."""
    assert model_spec(manifest).tensors == tuple(
        (tensor.name, tuple(tensor.shape)) for tensor in manifest.model.tensors
    )
    assert lanes_of(parameters(manifest))[UPDATE].length == model_spec(manifest).length


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_the_minimum_cohort(tmp_path, purpose):
    """A cohort below the signed minimum is refused with both numbers, one of exactly the minimum is not."""
    policy = msgspec.structs.replace(recipe.POLICY, minimum_cohort=4)
    strict = make_consortium(tmp_path, names=("a", "b", "c", "d", "e"), policy=policy).manifest
    with pytest.raises(ParameterError, match="round 7: a cohort of 3 sites, expected at least 4"):
        parameters(strict, round_number=7, purpose=purpose, cohort=("a", "b", "c"))
    assert parameters(strict, purpose=purpose).cohort == COHORT


def test_a_cohort_from_an_iterator(manifest):
    """Order and kind of the cohort do not matter, and each site is in it once."""
    assert parameters(manifest, cohort=iter("dbca")).context == parameters(manifest).context
    with pytest.raises(ParameterError, match="only 3 of them different"):
        parameters(manifest, cohort=("a", "b", "c", "c"))


def test_a_stranger_in_the_cohort(manifest):
    """A site that the manifest does not list is in no cohort."""
    with pytest.raises(ParameterError, match="mallory not in the roster"):
        parameters(manifest, cohort=(*COHORT, "mallory"))


@pytest.mark.parametrize(
    ("policy", "survivors"),
    [({}, 3), ({"minimum_survivors": 4, "minimum_cohort": 4}, 4), ({"max_corrupt": 0}, 3)],
    ids=str,
)
def test_the_thresholds(tmp_path, policy, survivors):
    """Corruption bound and least number of survivors are the manifest's, or stricter where the cohort needs it."""
    changed = msgspec.structs.replace(recipe.POLICY, **policy)
    one = parameters(make_consortium(tmp_path, policy=changed).manifest)
    assert (one.threshold, one.max_corrupt, one.minimum_survivors) == (3, changed.max_corrupt, survivors)


def test_survivors_of_a_large_cohort(tmp_path):
    """In a larger cohort the least number of survivors grows with the threshold."""
    names = tuple("abcdefghi")
    one = parameters(make_consortium(tmp_path, names=names).manifest, cohort=names)
    assert (one.threshold, one.minimum_survivors) == (7, 7)


def test_large_cohorts_use_the_sparse_graph():
    """Above 100 sites the manifest's share of dropouts fixes the neighbours, and its minimum can only raise theirs."""
    policy = msgspec.structs.replace(recipe.POLICY, max_corrupt=10)
    assert policy.thresholds(100) == {"graph": "auto", "max_corrupt": 10, "minimum_survivors": 67}
    large = {"graph": "auto", "max_corrupt": 10, "max_dropouts": 20, "minimum_survivors": 107}
    assert policy.thresholds(200) == large
    assert choose_thresholds(200, **large).neighbours == 42
    strict = msgspec.structs.replace(policy, minimum_survivors=108)
    with pytest.raises(ParameterError, match="minimum_survivors: found 108, expected max_corrupt"):
        strict.thresholds(200)


def test_both_sides_arrive_at_the_same(tmp_path):
    """A site and the coordinator that read the manifest from their own files have the same context."""
    consortium = make_consortium(tmp_path)
    loaded = type(consortium.manifest).load(consortium.manifest_path)
    assert parameters(loaded).context == parameters(consortium.manifest).context


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": "evaluate"},
        {"run": "another"},
        {"round_number": 2},
        {"cohort": ("a", "b", "c")},
        {"model_digest": b"\x01" * 32},
    ],
    ids=str,
)
def test_the_context_binds(manifest, change):
    """Another purpose, run, number, cohort or model is another context, under which nothing of this round opens."""
    assert parameters(manifest, **change).context != parameters(manifest).context


def test_the_context_binds_the_whole_manifest(manifest):
    """Another manifest is another context, even where it differs in what the round does not use."""
    privacy = msgspec.structs.replace(manifest.privacy, epsilon=1000.0)
    changed = msgspec.structs.replace(manifest, privacy=privacy)
    assert parameters(changed).digest == parameters(manifest).digest
    assert parameters(changed).context != parameters(manifest).context


def test_no_more_rounds_than_were_signed(manifest):
    """A coordinator that asks for an update, or an evaluation, after the planned rounds is refused."""
    planned = manifest.training.rounds
    parameters(manifest, round_number=planned)
    parameters(manifest, round_number=planned + 1, purpose="evaluate")
    for number, purpose in ((planned + 1, "train"), (planned + 2, "evaluate")):
        with pytest.raises(ParameterError, match=f"{purpose}: the manifest has {planned} training rounds"):
            parameters(manifest, round_number=number, purpose=purpose)
