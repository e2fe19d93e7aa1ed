"""Uniqueness, on known answers: fates add up, two-root blocks are told with their distance, contractions have none."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from targets.examples import small_detector, small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, fit_exact
from backsight.exact.solver import Settings
from backsight.exact.starts import Half
from backsight.inverses.linear import fit_linear
from backsight.representation import Tokens
from backsight.studies import exact as study
from backsight.studies.exact import (
    follow_chain,
    measure_chain,
    measure_exactness,
    measure_half_steps,
    outcomes_of,
    where_exactness_ends,
)
from backsight.studies.roots import Case, RootChoosing, judged
from backsight.studies.second_roots import (
    FoundRoots,
    find_roots,
    foldable_steps,
    root_rows,
    second_root_pictures,
)
from backsight.studies.tidy_rows import wilson_interval
from backsight.tables.names import ALL_TOKENS, FATES, ONE_TOKEN, RANDOM_MOVE, TRUE_STREAM
from backsight.tables.values import METRIC_COLUMNS
from backsight.targets import Target

LAST, HALF = "blocks.1", "blocks.1.attn"
QUIET = {"progress": False}
SECOND = 2 * 1.9150080481545  # between the outer roots of x = 2 tanh x


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def usual() -> ExactInverse:
    """A small ViT as it is drawn: every half-step is a contraction."""
    target = small_timm("ViT")
    size = target.image_size
    shown = torch.nn.functional.interpolate(pictures(24), size=size)
    return RootChoosing.of(fit_exact(target, shown, taps=[LAST], stages=1, progress=False)[LAST])


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
    model.__dict__["single"] = model
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
    changed = RootChoosing(model, LAST, fitted, settings=Settings(choose=False))
    streams = {**truth, HALF: truth[HALF].replace(there), LAST: truth[LAST].replace(forward(there))}
    return Case(changed, streams)


def value(table, measure: str, **where: object) -> float:  # type: ignore[no-untyped-def]
    rows = table[table["measure"] == measure]
    for column, wanted in where.items():
        rows = rows[rows[column].isna() if wanted is None else rows[column] == wanted]
    assert len(rows) == 1, f"{len(rows)} rows of {measure} {where}"
    return float(rows["value"].iloc[0])


def rows_of(found: FoundRoots):  # type: ignore[no-untyped-def]
    return root_rows(small_timm("ViT"), [found])


def test_contractions_are_back_alone_and_in_a_chain(usual: ExactInverse) -> None:
    case = Case.of(usual, images_of(usual, 3))
    alone = measure_half_steps([case], **QUIET)
    assert set(METRIC_COLUMNS) <= set(alone.columns)
    assert list(dict.fromkeys(alone["step"])) == ["blocks.1", "blocks.1.attn", "blocks.0", "blocks.0.attn"]
    assert (alone[alone["measure"] == "back"]["value"] == 1).all()
    assert (alone[alone["measure"] == "back"]["low"] == wilson_interval(3, 3)[0]).all()
    chain = measure_chain([case], **QUIET)
    assert value(chain, "back") == 1
    assert sum(value(chain, fate) for fate in FATES) == 1
    assert value(chain, "error", step=None) < 1e-10
    assert value(chain, "survived", step="blocks.0.attn") == 1
    for step in foldable_steps(usual):
        roots = rows_of(find_roots(case, step, examples=2))
        assert value(roots, "roots") == 1
        assert value(roots, "several_roots") == value(roots, "negative_determinant") == 0
        assert value(roots, "truth_found") == value(roots, "complete") == 1
        assert value(roots, "tokens_right", rule="most usual") == 1


def test_a_single_image_and_several_weights_are_pooled(usual: ExactInverse) -> None:
    untrained = small_timm("ViT").untrained(3)
    other = fit_exact(untrained, images_of(usual, 10), taps=[LAST], stages=1, progress=False)[LAST]
    one = images_of(usual, 1)
    cases = [Case.of(each, one) for each in (usual, other)]
    table = measure_half_steps(cases, **QUIET)
    rows = table[(table["measure"] == "back") & (table["step"] == "blocks.0")]
    assert rows[["n", "seeds"]].to_numpy().tolist() == [[1, 2]]
    assert rows["value"].tolist() == [1.0]


def test_another_root_and_where_it_was_met_are_told(usual: ExactInverse) -> None:
    case = folded(usual, start=2.5)
    alone = measure_half_steps([case], case.inverse.settings, **QUIET)
    assert value(alone, "another_root", step=LAST) == 1
    assert value(alone, "tokens_right", step=LAST) == 0
    table = follow_chain(case, **QUIET)
    assert outcomes_of(table)["fate"].tolist() == ["another_root"] * 2
    assert outcomes_of(table)["lost_at"].tolist() == [LAST] * 2
    assert set(table["step"]) == {LAST}  # a wrong image is followed no further
    chain = measure_chain([case], **QUIET)
    assert [value(chain, fate) for fate in FATES] == [0, 1, 0, 0]
    assert value(chain, "lost_another_root", step=LAST) == 1
    assert value(chain, "survived", step="blocks.0.attn") == 0
    right = folded(usual, start=-2.5)
    table = measure_half_steps([right], right.inverse.settings, **QUIET)
    assert value(table, "back", step=LAST) == 1


def test_all_four_fates_are_told_apart_and_add_up(usual: ExactInverse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports that say what they are told: the accounting reads them alone."""
    case = Case.of(usual, images_of(usual, 5))

    def told(inverse: ExactInverse, trace: object, *others: object) -> pd.DataFrame:
        table, count = judged(inverse, trace, *others), len(trace.values)
        if trace.steps[-1].source == HALF or count < 5:
            return table
        error, another = [1e-9, 0.3, 0.3, 0.3, math.nan], [False, True, False, False, False]
        return table.assign(error=error, another_root=another, solved=[True, True, False, True, False])

    monkeypatch.setattr(study, "judged", told)
    outcomes = outcomes_of(follow_chain(case, **QUIET))
    assert outcomes["fate"].tolist() == ["back", "another_root", "unsolved", "error_grown", "unsolved"]
    assert outcomes["lost_at"].tolist()[1:] == [HALF] * 4
    chain = measure_chain([case], **QUIET)
    assert [value(chain, fate) for fate in FATES] == pytest.approx([0.2, 0.2, 0.4, 0.2])
    assert value(chain, "survived", step="blocks.1") == 1
    assert value(chain, "survived", step="blocks.1.attn") == pytest.approx(0.2)
    lost = [value(chain, f"lost_{fate}", step="blocks.1.attn") for fate in FATES[1:]]
    assert lost == pytest.approx([0.2, 0.4, 0.2])


def test_a_block_with_more_roots_is_told_with_the_distance_of_the_others(usual: ExactInverse) -> None:
    case = folded(usual, start=2.5)
    found = find_roots(case, LAST, examples=1)
    tokens = case.streams[LAST].values.shape[1]
    assert found.roots.count.tolist() == [3] * (2 * tokens)
    assert found.roots.degree.tolist() == [1.0] * (2 * tokens)
    others, root = found.nearest_other()
    assert others.tolist() == list(range(2 * tokens))
    distance = (found.roots.x[root] - found.truth[others]).norm(dim=1)
    assert torch.allclose(distance, torch.full_like(distance, SECOND / 2), rtol=1e-6)  # the middle root, 0
    table = rows_of(found)
    assert value(table, "roots") == 3
    assert value(table, "several_roots") == 1
    assert value(table, "truth_found") == 1
    # The start leads to the upper root, and the usual tokens are at the lower one.
    assert value(table, "tokens_right", rule="staged start") == 0
    assert value(table, "tokens_right", rule="most usual") == 1


def test_what_roots_are_of_is_refused_where_they_cannot_be_listed(usual: ExactInverse) -> None:
    case = Case.of(usual, images_of(usual, 1))
    assert foldable_steps(usual) == ["blocks.0", "blocks.1"]
    with pytest.raises(BacksightError, match="mixes tokens"):
        find_roots(case, "blocks.1.attn")
    with pytest.raises(BacksightError, match="no half-step"):
        find_roots(case, "blocks.3")


def test_second_roots_lead_to_the_same_y_and_are_seen_where_a_decoder_looks(usual: ExactInverse) -> None:
    case = folded(usual, start=2.5)
    images = images_of(usual, 2)
    size = images.shape[2:]

    def decoder(representation: Tokens) -> Tensor:
        grey = representation.values[:, representation.prefix :, 0].float().sigmoid()
        return grey.mean(1)[:, None, None, None].expand(-1, 3, *size)

    def blind(representation: Tokens) -> Tensor:
        return torch.full((representation.batch, 3, *size), 0.5)

    found = find_roots(case, LAST, examples=1)
    families = {"linear": {HALF: decoder}, "modular": {HALF: blind}}
    shown = second_root_pictures(case, found, images, families, **QUIET)
    assert set(shown.metrics["tap"]) == {HALF}
    for picture in (TRUE_STREAM, ONE_TOKEN, ALL_TOKENS):
        assert value(shown.metrics, "residual_largest", picture=picture) < 1e-10
    tokens = case.streams[LAST].values.shape[1]
    # Every token's first channel goes from −1.915 to 0, so that grey goes from 0.1284 to 0.5.
    low = torch.tensor(-SECOND / 2).sigmoid()
    expected = float(-20 * (0.5 - low).log10())
    assert value(shown.metrics, "psnr_between", picture=ALL_TOKENS, inverse="linear") == pytest.approx(
        expected, abs=1e-3
    )
    assert value(shown.metrics, "psnr_between", picture=ALL_TOKENS, inverse="modular") == 100
    assert value(shown.metrics, "psnr_between", picture=ONE_TOKEN, inverse="linear") == pytest.approx(
        expected + 20 * math.log10(tokens - 1), abs=1e-3
    )
    assert shown.metrics[shown.metrics["picture"] == RANDOM_MOVE]["measure"].ne("residual").all()
    assert all(bool(each.all()) for each in shown.reached.values())
    with pytest.raises(BacksightError, match="decoded by all"):
        second_root_pictures(case, found, images, {"linear": {}}, **QUIET)


def test_second_roots_are_taken_back_exactly_to_where_a_decoder_is(usual: ExactInverse) -> None:
    case = folded(usual, start=2.5)
    inverse, truth = case.inverse, case.streams

    def grey(representation: Tokens) -> Tensor:
        first = representation.values[:, 0, 0].float().sigmoid()
        return first[:, None, None, None].expand(-1, 3, *usual.model.target.image_size)

    steps = inverse.model.between(HALF, "blocks.0")
    before = truth["blocks.0"].values
    with torch.no_grad():
        half = steps[0](before)
    # Unlike in the other tests, the truth is of the model's own pass all the way.
    streams = {**truth, HALF: truth[HALF].replace(half)}
    last = inverse.model.between(LAST, HALF)[0]
    with torch.no_grad():
        streams[LAST] = truth[LAST].replace(last(half))
    case = Case(inverse, streams)
    found = find_roots(case, LAST, examples=1)
    shown = second_root_pictures(case, found, images_of(usual, 2), {"linear": {"blocks.0": grey}}, **QUIET)
    assert set(shown.metrics["tap"]) == {"blocks.0"}
    for picture in (ONE_TOKEN, ALL_TOKENS):
        assert value(shown.metrics, "reached", picture=picture) == 1
        assert value(shown.metrics, "residual_largest", picture=picture) < 1e-9


def test_where_exactness_ends_is_told_for_every_tap() -> None:
    vit = where_exactness_ends(small_timm("ViT"), "fine").set_index("tap")
    assert vit.loc["blocks.1", "exact_to"] == "patch_embed"
    assert vit.loc["blocks.1", "half_steps"] == 4
    assert vit.loc["blocks.1", "dimension_in"] == 3 * vit.loc["blocks.1", "dimension_out"] * 4  # rank 16 of 192
    assert "rank" in vit.loc["blocks.1", "reason"]
    assert vit.loc["norm", "means_lost"] == 17
    whole = where_exactness_ends(small_timm("ViT", patch_size=4, embed_dim=64)).set_index("tap")
    assert whole.loc["blocks.1", "exact_to"] == "pixels"
    assert whole.loc["blocks.1", "reason"] == ""
    made = where_exactness_ends(small_detector(), "fine").set_index("tap")
    assert made.loc["encoder.layers.1", "exact_to"] == "projection"
    assert made.loc["encoder.layers.1", "norms"] == "encoder.layers.0.attn"
    assert made.loc["decoder.layers.0", "exact_to"] == ""
    assert "no tokens of the image" in made.loc["decoder.layers.0", "reason"]


def test_the_whole_study_runs_small() -> None:
    target: Target = small_timm("ViT")
    shown = torch.nn.functional.interpolate(pictures(24), size=target.image_size)
    families = {"linear": fit_linear(target, shown, taps=["patch_embed", "blocks.0"], progress=False)}
    counts = {"n": 2, "n_chain": 3, "n_roots": 1, "fit_images": 10, "examples": 1, "curves": 0}
    with pytest.raises(BacksightError, match="nearest: blocks"):
        measure_exactness(target, families, root_steps=["blocks.7"], **counts, **QUIET)
    metrics, second_roots = measure_exactness(target, families, tap="blocks.0", seeds=(0, 1), **counts, **QUIET)
    assert set(metrics["study"]) == {"half_step", "chain", "roots"}  # no second root: no picture of one
    assert second_roots == {}
    assert set(metrics["seeds"]) == {1, 2}
    chain = metrics[(metrics["study"] == "chain") & metrics["step"].isna()]
    assert set(chain.loc[chain["seeds"] == 1, "n"]) == {3}
    assert set(chain.loc[chain["seeds"] == 2, "n"]) == {2}
    for _, part in chain[chain["measure"].isin(FATES)].groupby("seeds"):
        assert part["value"].sum() == pytest.approx(1)
