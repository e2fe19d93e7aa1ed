"""Uniqueness, on known answers: fates add up, two-root blocks are told with their distance, contractions have none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from targets.examples import small_detector, small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, fit_exact
from backsight.exact.solver import Settings
from backsight.exact.starts import Half
from backsight.representation import Tokens
from backsight.studies import exact as fates
from backsight.studies.exact import Case, chain, half_steps, relative_error, where_exactness_ends
from backsight.studies.roots import FIRST, USUAL, FoundRoots, find_roots, foldable_steps, second_root_pictures
from backsight.tables.names import ALL_TOKENS, FATES, ONE_TOKEN, RANDOM_MOVE, TRUE_STREAM
from backsight.tables.pooling import pool
from backsight.tables.values import Values

LAST, HALF = "blocks.1", "blocks.1.attn"
PLAIN = Settings(choose=False)
SECOND = 2 * 1.9150080481545  # between the outer roots of x = 2 tanh x


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def usual() -> ExactInverse:
    """A small ViT as it is drawn: every half-step is a contraction."""
    target = small_timm("ViT")
    size = target.image_size
    shown = torch.nn.functional.interpolate(pictures(24), size=size)
    return fit_exact(target, shown, taps=[LAST], stages=1, progress=False)[LAST]


def images_of(inverse: ExactInverse, count: int) -> Tensor:
    return torch.nn.functional.interpolate(pictures(count, seed=1), size=inverse.model.target.image_size)


def kinked(x: Tensor) -> Tensor:
    """Three roots of each channel where it is small: −, +, − sides, of which the outer ones are SECOND apart at 0."""
    return x - 2 * x.tanh()


def folded(usual: ExactInverse, start: float) -> Case:
    """The same model with a last half-step that folds in one channel; truth: its lower root; start: where to begin."""
    model = usual.model
    number = model.taps[LAST]

    def forward(x: Tensor) -> Tensor:
        return torch.cat([kinked(x[..., :1]), x[..., 1:]], dim=-1)

    def jacobian(x: Tensor) -> Tensor:
        slope = torch.ones_like(x)
        slope[:, 0] = 1 - 2 / x[:, 0].cosh().square()
        return torch.diag_embed(slope)

    half = Half(replace(model.steps[number], forward=forward, jacobian=jacobian))
    model = replace(model, steps={**model.steps, number: half.step})
    truth = Case.of(usual, images_of(usual, 2)).streams
    there = truth[HALF].values.clone()
    there[..., 0] = -SECOND / 2
    width = there.shape[-1]
    half.fit(there + 0.1 * truth[HALF].values, forward(there), 1, 1)
    half.folding.fill_(0.5)
    half.stage0.zero_()
    half.stage0[:, :width] = torch.eye(width)
    half.stage0[:, 0, 0], half.stage0[:, width, 0] = 0.0, start
    fitted = {**usual.fitted(), LAST: half}
    changed = ExactInverse(model, LAST, fitted, settings=PLAIN)
    streams = {**truth, HALF: truth[HALF].replace(there), LAST: truth[LAST].replace(forward(there))}
    return Case(changed, streams, PLAIN)


def values_of(count: int) -> Values:
    return Values(small_timm("ViT"), "noise", "test", range(count))


def value(values: Values, measure: str, **where: object) -> float:
    """The mean of the values of a measure."""
    table = values.table()
    rows = table[table["measure"] == measure]
    for column, wanted in where.items():
        rows = rows[rows[column].isna() if wanted is None else rows[column] == wanted]
    assert len(rows), f"no value of {measure} {where}"
    assert not rows.duplicated(["image", "train_seed"]).any(), f"several of {measure} {where}"
    return float(rows["value"].mean())


def of_roots(found: FoundRoots) -> Values:
    values = values_of(found.images)
    found.add_to(values)
    return values


def test_contractions_are_back_alone_and_in_a_chain(usual: ExactInverse) -> None:
    case, values = Case.of(usual, images_of(usual, 3)), values_of(3)
    half_steps(values, case)
    alone = values.table()
    assert list(dict.fromkeys(alone["step"])) == ["blocks.1", "blocks.1.attn", "blocks.0", "blocks.0.attn"]
    assert (alone[alone["measure"] == "back"]["value"] == 1).all()
    chain(values, case)
    assert value(values, "back", study="chain") == 1
    assert sum(value(values, fate, study="chain") for fate in FATES) == 1
    assert value(values, "lost_unsolved", step="blocks.0.attn") == 0
    for step in foldable_steps(usual):
        roots = of_roots(find_roots(case, step))
        assert value(roots, "roots") == 1
        assert value(roots, "several_roots") == value(roots, "negative_determinant") == 0
        assert value(roots, "complete") == 1
        assert value(roots, "tokens_right", rule=USUAL) == 1


def test_a_single_image_and_several_weights_are_pooled(usual: ExactInverse) -> None:
    untrained = small_timm("ViT").untrained(3)
    other = fit_exact(untrained, images_of(usual, 10), taps=[LAST], stages=1, progress=False)[LAST]
    values = values_of(1)
    for seed, inverse in enumerate((usual, other)):
        half_steps(values, Case.of(inverse, images_of(usual, 1)), train_seed=seed)
    rows = pool(values.table())
    rows = rows[(rows["measure"] == "back") & (rows["step"] == "blocks.0")]
    assert rows[["value", "n", "seeds"]].to_numpy().tolist() == [[1.0, 1, 2]]


def test_another_root_and_where_it_was_met_are_told(usual: ExactInverse) -> None:
    case, values = folded(usual, start=2.5), values_of(2)
    half_steps(values, case)
    assert value(values, "another_root", step=LAST) == 1
    chain(values, case)
    assert [value(values, fate, study="chain") for fate in FATES] == [0, 1, 0, 0]
    assert value(values, "lost_another_root", step=LAST) == 1
    assert value(values, "lost_another_root", step=HALF) == 0  # a wrong image is followed no further
    right = values_of(2)
    half_steps(right, folded(usual, start=-2.5))
    assert value(right, "back", step=LAST) == 1


def test_all_four_fates_are_told_apart_and_add_up(usual: ExactInverse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solutions that say what they are told: the accounting reads them alone."""
    case, values = Case.of(usual, images_of(usual, 5)), values_of(5)
    trace = ExactInverse.trace
    solved = torch.tensor([True, True, False, True, False])
    factor = torch.tensor([1 + 1e-9, 1.3, 1.3, 1.3, math.nan], dtype=torch.float64)[:, None, None]

    def told(inverse: ExactInverse, tokens: Tokens, to: str | None = None) -> object:
        made = trace(inverse, tokens, to)
        if made.steps[-1].destination == LAST or tokens.batch < 5:
            return made
        ended = made.solutions[0]._replace(x=factor * made.solutions[0].x, solved=solved)
        return replace(made, values=ended.x, solutions=[ended])

    monkeypatch.setattr(ExactInverse, "trace", told)
    monkeypatch.setattr(fates, "_elsewhere", lambda *_: torch.tensor([True, True, True, False, True]))
    chain(values, case)
    assert [value(values, fate, step=None) for fate in FATES] == pytest.approx([0.2, 0.2, 0.4, 0.2])
    assert [value(values, f"lost_{fate}", step="blocks.1") for fate in FATES[1:]] == [0, 0, 0]
    lost = [value(values, f"lost_{fate}", step="blocks.1.attn") for fate in FATES[1:]]
    assert lost == pytest.approx([0.2, 0.4, 0.2])


def test_a_block_with_more_roots_is_told_with_the_distance_of_the_others(usual: ExactInverse) -> None:
    case = folded(usual, start=2.5)
    found = find_roots(case, LAST)
    tokens = case.streams[LAST].values.shape[1]
    assert found.sign.abs().sum(1).tolist() == [3.0] * (2 * tokens)
    assert found.sign.sum(1).tolist() == [1.0] * (2 * tokens)
    _, distance, has = found.other()
    assert bool(has.all())
    assert torch.allclose(distance, torch.full_like(distance, SECOND / 2), rtol=1e-6)  # the middle root, 0
    values = of_roots(found)
    assert value(values, "roots") == 3
    assert value(values, "several_roots") == 1
    assert bool(found.near.any(1).all())
    # The start leads to the upper root, and the usual tokens are at the lower one.
    assert value(values, "tokens_right", rule=FIRST) == 0
    assert value(values, "tokens_right", rule=USUAL) == 1


def test_what_roots_are_of_is_refused_where_they_cannot_be_listed(usual: ExactInverse) -> None:
    case = Case.of(usual, images_of(usual, 1))
    assert foldable_steps(usual) == ["blocks.0", "blocks.1"]
    for other in ("blocks.1.attn", "blocks.3"):
        with pytest.raises(BacksightError, match="no half-step on tokens alone"):
            find_roots(case, other)


def test_second_roots_lead_to_the_same_y_and_are_seen_where_a_decoder_looks(usual: ExactInverse) -> None:
    case, values = folded(usual, start=2.5), values_of(2)
    size, given = usual.model.target.image_size, list[Tensor]()

    def decoder(representation: Tokens) -> Tensor:
        given.append(representation.values.double())
        grey = representation.values[:, representation.prefix :, 0].float().sigmoid()
        return grey.mean(1)[:, None, None, None].expand(-1, 3, *size)

    def blind(representation: Tokens) -> Tensor:
        return torch.full((representation.batch, 3, *size), 0.5)

    found = find_roots(case, LAST)
    shown = second_root_pictures(values, case, found, {HALF: decoder}, "linear")
    second_root_pictures(values, case, found, {HALF: blind}, "direct")
    table = values.table()
    assert set(table["tap"]) == {HALF}
    off = [float(relative_error(found.step(x), case.streams[LAST].values).max()) for x in given]
    assert list(shown) == [TRUE_STREAM, ONE_TOKEN, ALL_TOKENS, RANDOM_MOVE]
    assert max(off[:3]) < 1e-6 < 1e-3 < off[3]
    values = values_of(2)
    second_root_pictures(values, case, found, {HALF: decoder}, "linear")
    tokens = case.streams[LAST].values.shape[1]
    # Every token's first channel goes from −1.915 to 0, so that grey goes from 0.1284 to 0.5.
    low = torch.tensor(-SECOND / 2).sigmoid()
    expected = float(-20 * (0.5 - low).log10())
    assert value(values, "psnr_between", picture=ALL_TOKENS) == pytest.approx(expected, abs=1e-3)
    grown = expected + 20 * math.log10(tokens - 1)
    assert value(values, "psnr_between", picture=ONE_TOKEN) == pytest.approx(grown, abs=1e-3)
    assert (table[(table["inverse"] == "direct") & (table["measure"] == "psnr_between")]["value"] == 100).all()
    assert all(bool(reached.all()) for _, reached in shown.values())
    with pytest.raises(BacksightError, match="is decoded by linear"):
        second_root_pictures(values, case, found, {}, "linear")


def test_second_roots_are_taken_back_exactly_to_where_a_decoder_is(usual: ExactInverse) -> None:
    case, values = folded(usual, start=2.5), values_of(2)
    inverse, truth = case.inverse, case.streams

    given = []

    def grey(representation: Tokens) -> Tensor:
        given.append(representation.values.double())
        first = representation.values[:, 0, 0].float().sigmoid()
        return first[:, None, None, None].expand(-1, 3, *usual.model.target.image_size)

    steps = inverse.model.between(HALF, "blocks.0")
    with torch.no_grad():
        half = steps[0](truth["blocks.0"].values)
        # Unlike in the other tests, the truth is of the model's own pass all the way.
        last = truth[LAST].replace(inverse.model.between(LAST, HALF)[0](half))
    case = Case(inverse, {**truth, HALF: truth[HALF].replace(half), LAST: last})
    shown = second_root_pictures(values, case, find_roots(case, LAST), {"blocks.0": grey}, "linear")
    assert set(values.table()["tap"]) == {"blocks.0"}
    for x, picture in zip(given, (TRUE_STREAM, ONE_TOKEN, ALL_TOKENS), strict=False):
        assert bool(shown[picture][1].all())
        y = inverse.model.between(LAST, HALF)[0](steps[0](x))
        assert float(relative_error(y, last.values).max()) < 1e-5
    assert not torch.equal(given[2], given[0])


def test_where_exactness_ends_is_told_for_every_tap() -> None:
    vit = where_exactness_ends(small_timm("ViT").select("fine")).set_index("tap")
    assert vit.loc["blocks.1", "exact_to"] == "patch_embed"
    assert vit.loc["blocks.1", "half_steps"] == 4
    assert "16 of 192 directions" in vit.loc["blocks.1", "why"]
    assert vit.loc["norm", "means_lost"] == 17
    whole = where_exactness_ends(small_timm("ViT", patch_size=4, embed_dim=64)).set_index("tap")
    assert whole.loc["blocks.1", "exact_to"] == "pixels"
    assert whole.loc["blocks.1", "why"] == ""
    made = where_exactness_ends(small_detector().select("fine")).set_index("tap")
    assert made.loc["encoder.layers.1", "exact_to"] == "projection"
    assert made.loc["encoder.layers.1", "means_lost"] > 0  # of the norm between attention and MLP
    assert made.loc["decoder.layers.0", "exact_to"] == ""
    assert "no known residual block" in made.loc["decoder.layers.0", "why"]
