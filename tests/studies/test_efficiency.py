"""The matched comparison: counted costs, sums along the chain, equal starts, and figures from the table alone."""

import io
import math

import pandas as pd
import pytest
import torch
from torch import nn

from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.studies import efficiency, trainings
from backsight.studies.trainings import ALL, METHODS, Cost, Setting, Starts, Trial
from backsight.tables.values import METRIC_COLUMNS
from backsight.targets import load_target

COLUMNS = {"dataset": "scenes", "split": "test"}


@pytest.fixture(scope="module")
def setting() -> Setting:
    target = load_target("scenes-vit")
    validation, test = (open_images("scenes", split, target, 8, 0) for split in ("validation", "test"))
    return trainings.setting_for(
        target, "components", validation=validation, test=test, train_images=40, batch_size=4, validation_images=8
    )


@pytest.fixture(scope="module")
def starts(setting: Setting) -> Starts:
    return trainings.closed_form_starts(setting, 0)


def _trial(setting: Setting, method: str, level: float, **changed) -> Trial:
    """A trial whose PSNR falls by one dB a tap from `level`."""
    taps = setting.chain if method in ("linear", "modular", "modular_polished") else setting.judged
    noise = torch.randn(8, generator=torch.Generator().manual_seed(changed.get("seed", 0))) * 0.1
    values = {tap: level - setting.target.depth(tap) + noise for tap in taps}
    plain = {"part": "curve", "start": "closed_form", "steps": 10, "learning_rate": 1e-3, "train_images": 40, "seed": 0}
    costs = {"flops": 1e9 * (1 + changed.get("steps", 10)), "seconds": 1.0 + changed.get("steps", 10), "parameters": 10}
    return Trial(method=method, values=values, **{**plain, **costs, **changed})


@pytest.fixture(scope="module")
def trials(setting: Setting) -> list[Trial]:
    found = [_trial(setting, "linear", 25.0, steps=0, seed=s) for s in (0, 1)]
    for number, method in enumerate(METHODS):
        for steps in (0, 10, 40):
            found += [_trial(setting, method, 25.0 + steps / 10 + number, steps=steps, seed=s) for s in (0, 1)]
        for rate in (1e-3, 1e-2):
            found.append(_trial(setting, method, 20 + rate, part="search", learning_rate=rate))
        found.append(_trial(setting, method, 20.0, part="data", train_images=10, steps=40))
        found.append(_trial(setting, method, 18.0, part="start", start="random", steps=40))
        found.append(_trial(setting, method, 26.0, part="per_image", steps=40))
    found.append(_trial(setting, "optimised_tv", 15.0, part="per_image", start="random", train_images=0, flops=8e9))
    return [t if t.part != "per_image" else _only(t, setting.judged[-1]) for t in found]


def _only(trial: Trial, tap: str) -> Trial:
    return Trial(**{**trial.__dict__, "values": {tap: trial.values[tap]}})


@pytest.fixture(scope="module")
def metrics(setting: Setting, trials: list[Trial]) -> pd.DataFrame:
    ends = [t for t in trials if t.part == "curve" and (t.steps == 40 or t.method == "linear")]
    tables = [efficiency.tidy(setting, trials, **COLUMNS), efficiency.chain_table(setting, ends, **COLUMNS)]
    text = io.StringIO()
    pd.concat(tables, ignore_index=True).to_csv(text, index=False)
    text.seek(0)
    return pd.read_csv(text)


def test_flops_of_known_layers_are_exact() -> None:
    layer, convolution = nn.Linear(5, 7), nn.Conv2d(3, 4, 3, padding=1)
    x, image = torch.zeros(11, 5), torch.zeros(2, 3, 6, 6)
    forward = 2 * 11 * 5 * 7
    assert trainings.count_flops(lambda: layer(x)) == forward
    # The gradient of the weights costs as much again; that of the input is not asked for.
    assert trainings.count_flops(lambda: layer(x).sum().backward()) == 2 * forward
    assert trainings.count_flops(lambda: convolution(image)) == 2 * 2 * 6 * 6 * 4 * 3 * 9


def test_costs_are_counted_and_grow_with_steps_and_images(setting: Setting, starts: Starts) -> None:
    linear = trainings.cost_of(setting, "linear", starts)
    direct = trainings.cost_of(setting, "direct", starts)
    image = setting.test.image(0)[None].float() / 255
    frozen = trainings.count_flops(lambda: setting.target.record(image, setting.judged))
    assert direct.step > setting.batch_size * frozen
    assert linear.start_image > frozen
    assert (linear.preparation, linear.step) == (0, 0)
    totals = [direct.total(steps, images) for steps, images in ((0, 40), (1, 40), (10, 40), (10, 400))]
    assert totals == sorted(set(totals))
    assert totals[2] - totals[1] == pytest.approx(9 * direct.step)


def test_every_block_by_direct_decoders_costs_more_than_few(setting: Setting, starts: Starts) -> None:
    whole = efficiency.every_block(setting)
    assert whole.judged == setting.chain
    few, many = (trainings.cost_of(each, "direct", starts, "random").step for each in (setting, whole))
    assert many > few


def test_the_closed_form_is_where_every_fit_starts(setting: Setting, starts: Starts) -> None:
    """Also: a direct decoder before training is the linear family, and both chains start at the same place."""
    values = {m: trainings.closed_form_trial(setting, m, starts, Cost()).values for m in ("linear", *METHODS[:-1])}
    for tap in setting.judged:
        torch.testing.assert_close(values["direct"][tap], values["linear"][tap])
    for method in ("direct", "modular"):
        trial, inverses = trainings.train_once(setting, method, starts, Cost(), steps=0, learning_rate=1e-3)
        for tap in setting.taps(method):
            torch.testing.assert_close(trial.values[tap], values[method][tap], atol=1e-3, rtol=0)
        assert trial.parameters == sum(map(trainings.numbers_held, inverses.modules.values()))
    assert set(values["modular"]) == set(setting.chain)


def test_random_starts_hold_no_closed_form(setting: Setting, starts: Starts) -> None:
    for method in ("direct", "modular_components"):
        trial, inverses = trainings.train_once(
            setting, method, starts, Cost(), steps=1, learning_rate=1e-3, start="random", part="start"
        )
        assert all(inverse.linear is None for inverse in inverses.modules.values())
        assert trial.start == "random"
        assert set(trial.values) == set(setting.judged)


def test_added_errors_along_a_chain_sum_to_its_error(setting: Setting, starts: Starts) -> None:
    values = trainings.closed_form_trial(setting, "modular", starts, Cost()).values
    path = efficiency.chain_path(setting.pairs("modular"))
    assert [source for source, _ in path] == list(reversed(setting.chain))
    losses = efficiency.chain_losses(values, path)
    whole = torch.pow(10.0, -values[path[0][0]].double() / 10)
    torch.testing.assert_close(torch.stack([added for _, added in losses.values()]).sum(0), whole)
    lost = torch.stack([lost for lost, _ in losses.values()])
    torch.testing.assert_close(lost[:-1].sum(0), values[path[-1][0]] - values[path[0][0]], check_dtype=False)
    # Fed with the true representation at the bottom, the chain is its last module alone.
    plain = trainings.tap_psnr(setting.target, {path[-1][0]: starts.maps[path[-1]]}, setting.test)[path[-1][0]]
    torch.testing.assert_close(losses[path[-1][0]][1], torch.pow(10.0, -plain.double() / 10))
    assert lost[-1].isnan().all()


def test_inverses_from_elsewhere_are_judged_beside(setting: Setting, starts: Starts) -> None:
    linear = {tap: starts.maps[tap, "pixels"] for tap in setting.chain}
    families = {0: {"linear": linear, "few": {"blocks.0": linear["blocks.0"]}}}
    (found,) = efficiency.reference_trials(setting, families)
    expected = trainings.closed_form_trial(setting, "linear", starts, Cost()).values
    torch.testing.assert_close(found.values["blocks.5"], expected["blocks.5"])
    table = efficiency.tidy(setting, [found], **COLUMNS)
    assert set(table["part"]) == {"reference"}
    assert table["flops"].isna().all()


def test_the_search_takes_the_best_rate_and_survives_divergence(
    setting: Setting, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(setting, method, starts, cost, *, learning_rate, images, part, **_options):
        assert images is setting.validation
        if learning_rate > 1:
            raise BacksightError("The loss of 'blocks.0' became nan at step 3: lower the learning rate.")
        level = 20 - abs(math.log10(learning_rate) + 2)
        return _trial(setting, method, level, part=part, learning_rate=learning_rate), {}

    monkeypatch.setattr(trainings, "train_once", trained)
    best, trials = trainings.search_learning_rate(setting, "direct", starts, [1e-3, 1e-2, 1e-1, 10.0], 5)
    assert best == 1e-2
    assert len(trials) == 3
    with pytest.raises(BacksightError, match="give smaller ones"):
        trainings.search_learning_rate(setting, "direct", starts, [10.0], 5)


def test_the_table_is_tidy_and_complete(setting: Setting, metrics: pd.DataFrame) -> None:
    assert set(METRIC_COLUMNS) | set(trainings.COLUMNS) | {"seeds"} <= set(metrics.columns)
    assert not metrics[["value", "low", "high", "n", "seeds"]].isna().any().any()
    assert ((metrics["low"] <= metrics["value"]) & (metrics["value"] <= metrics["high"])).all()
    curve = metrics[(metrics["part"] == "curve") & (metrics["tap"] == ALL)]
    assert set(curve["seeds"]) == {2}
    for _, line in curve[curve["inverse"].isin(METHODS)].groupby("inverse"):
        ordered = line.sort_values("steps")
        assert ordered["flops"].is_monotonic_increasing
        assert ordered["seconds"].is_monotonic_increasing
    assert set(metrics.loc[metrics["part"] == "search", "split"]) == {"validation"}
    assert set(metrics.loc[metrics["part"] != "search", "split"]) == {"test"}
    shares = metrics[metrics["measure"] == "chain_share"].groupby("inverse")["value"].sum()
    assert shares.to_numpy() == pytest.approx(1.0)
    lost = metrics[(metrics["measure"] == "chain_error") & (metrics["inverse"] == "modular")]
    assert lost["value"].to_numpy() == pytest.approx(1.0, abs=1e-5)
    assert set(lost["module"]) == set(setting.chain[1:])


def test_differences_are_paired(setting: Setting, trials: list[Trial]) -> None:
    found = efficiency.difference_table(setting, trials, "modular", "direct")
    row = found[(found["tap"] == ALL) & (found["steps"] == 40) & (found["part"] == "curve")].iloc[0]
    # The noise of an image is the same for both, so that nothing of it is left.
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)
    assert row["seeds"] == 2


def test_break_even_divides_a_training_by_an_image(metrics: pd.DataFrame) -> None:
    found = efficiency.break_even(metrics).set_index("inverse")
    assert found.loc["direct", "images"] == pytest.approx(41e9 / (8e9 / 8))


def test_claims_can_come_out_either_way(metrics: pd.DataFrame) -> None:
    claims = efficiency.check_comparison(metrics).set_index("claim")["holds"]
    claim = "modular: at least as good as direct for no more FLOPs"
    assert claims[claim]
    assert not claims["direct (closed_form): the best learning rate is inside the range searched"]
    tied = metrics.assign(value=metrics["value"].where(metrics["part"] != "search", 20.0))
    numbers = efficiency.check_comparison(tied).set_index("claim")["numbers"]
    assert "tie" in numbers["direct (closed_form): the best learning rate is inside the range searched"]
    worse = metrics.assign(value=metrics["value"].where(metrics["inverse"] != "modular", 1.0))
    assert not efficiency.check_comparison(worse).set_index("claim")["holds"][claim]


def test_judged_taps_and_chains(setting: Setting) -> None:
    assert setting.judged == ("patch_embed", "blocks.2", "blocks.5")
    assert setting.chain[-1] == setting.judged[-1]
    assert set(setting.judged) < set(setting.chain)
    assert setting.pairs("modular_components")[-1] == ("blocks.5", "blocks.2")
    named = trainings.setting_for(setting.target, ["blocks.1"], validation=setting.validation, test=setting.test)
    assert named.judged == ("blocks.1",)
    assert named.chain == ("patch_embed", "blocks.0", "blocks.1")
    with pytest.raises(BacksightError, match=r"blocks\.9"):
        trainings.setting_for(setting.target, ["blocks.9"], validation=None, test=None)


def test_nulls_stand_beside_the_trainings(setting: Setting, starts: Starts) -> None:
    nulls = {trial.method: trial for trial in efficiency.null_trials(setting, starts)}
    assert set(nulls) == {"null_mean", "null_shuffled", "null_untrained"}
    table = efficiency.tidy(setting, nulls.values(), **COLUMNS)
    assert set(table.tap) == {*setting.judged, ALL}
    assert (table.part == "nulls").all()
    first = setting.judged[0]
    own = trainings.tap_psnr(setting.target, {first: starts.maps[first, "pixels"]}, setting.test)[first]
    assert own.mean() > nulls["null_mean"].values[first].mean() > nulls["null_shuffled"].values[first].mean()
    mean = nulls["null_mean"].values
    assert all(torch.equal(mean[tap], mean[first]) for tap in setting.judged)  # it reads nothing
