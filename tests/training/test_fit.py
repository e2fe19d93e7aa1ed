"""What the fits promise: they start at the closed form, give what was validated, and leave everything as it was."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from targets.examples import small_timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from backsight import load_target
from backsight.data.images import batches, open_images
from backsight.errors import BacksightError
from backsight.inverses.linear import fit_linear_pairs
from backsight.inverses.module import Inverses
from backsight.targets.base import Preprocessing, Target, seeded
from backsight.targets.detectors import Detr
from backsight.targets.timm_models import TimmTarget
from backsight.training import fit as fitting
from backsight.training.fit import fit_direct, fit_modular, fit_polish, fit_starts
from backsight.training.loop import train
from backsight.training.starts import moments_of, power_sums, stage_pairs

QUICK = {"steps": 2, "batch_size": 4, "ridge_images": 24, "progress": False}


def _images(count: int = 24, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Smooth colour fields: what a token holds says something of its pixels."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return (smooth * 255).round() / 255


@pytest.fixture(scope="module")
def vit() -> TimmTarget:
    with seeded(0):
        model = VisionTransformer(img_size=(16, 40), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    usual = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (16, 40))
    return TimmTarget(model, "tiny-vit", "random", usual)


@pytest.fixture(scope="module")
def detr() -> Detr:
    small = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        backbone_config=backbone, d_model=16, encoder_layers=2, decoder_layers=2, num_queries=5, num_labels=2, **small
    )
    with seeded(0):
        model = DetrForObjectDetection(config)
    return Detr(model, "tiny-detr", Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 32)), "random", ("disc", "ring"))


def _shown(target: Target, count: int = 24, seed: int = 0) -> Tensor:
    return _images(count, *target.image_size, seed=seed)


def _same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("fit", [fit_direct, fit_modular])
@pytest.mark.parametrize("kind", ["vit", "detr"])
def test_before_training_every_inverse_is_the_closed_form(kind: str, fit, request) -> None:
    target: Target = request.getfixturevalue(kind)
    images = _shown(target)
    recorded = target.record(images[:3])
    pairs = [(tap, "pixels") for tap in target.taps] if fit is fit_direct else list(stage_pairs(target, target.taps))
    maps = fit_linear_pairs(target, images, pairs, progress=False)
    inverses = fit(target, images, starts=maps, **{**QUICK, "steps": 0})
    for source, end in pairs:
        made, wanted = inverses.module(source).raw(recorded[source]), maps[source, end].raw(recorded[source])
        assert torch.equal(*(x if end == "pixels" else x.values for x in (made, wanted))), source


@pytest.mark.parametrize("fit", [fit_direct, fit_modular])
def test_without_ridge_images_nothing_starts_in_closed_form(vit, fit) -> None:
    inverses = fit(vit, _shown(vit), **{**QUICK, "steps": 0, "ridge_images": 0})
    assert [module.linear for module in inverses.modules.values()] == [None] * len(vit.taps)


def test_families_share_one_pass_for_their_starts(vit) -> None:
    images, held_out = _shown(vit, 32), _shown(vit, 8, seed=1)
    starts = fit_starts(vit, images, held_out, families=["linear", "direct", "modular"], progress=False)
    assert set(starts) == {"direct", "modular"}
    for family, fit in (("direct", fit_direct), ("modular", fit_modular)):
        alone = fit(vit, images, held_out, **{**QUICK, "steps": 2})
        shared = fit(vit, images, held_out, starts=starts[family], **{**QUICK, "steps": 2})
        assert all(_same(alone.module(tap), shared.module(tap)) for tap in vit.taps), family


def test_training_gains_over_the_closed_form_on_images_that_nothing_has_seen() -> None:
    """A shipped target: after 16 steps pictures from a deep tap are nearer than those of the closed-form start."""
    target = load_target("scenes-vit", taps=["blocks.5"])
    splits = {"train": 96, "validation": 32, "test": 96}
    train, validation, test = (open_images("scenes", s, target, n) for s, n in splits.items())
    shown = next(batches(test, 96))
    recorded = target.record(shown)["blocks.5"]
    settings = {"ridge_images": 96, "progress": False}
    start = fit_direct(target, train, steps=0, **settings)
    starts = {("blocks.5", "pixels"): start.module("blocks.5").linear}
    trained = fit_direct(target, train, validation, starts=starts, steps=16, **settings)
    before, after = (F.mse_loss(family["blocks.5"](recorded), shown) for family in (start, trained))
    assert after < 0.99 * before


def test_the_first_steps_of_a_wide_module_keep_what_the_start_knows() -> None:
    with seeded(0):
        model = VisionTransformer(img_size=56, patch_size=14, embed_dim=384, depth=1, num_heads=6, num_classes=3)
    target = TimmTarget(model, "wide-vit", "random", Preprocessing((0.5,) * 3, (0.5,) * 3, (56, 56)))
    images, validation = (open_images("leaves", split, target, 64) for split in ("train", "validation"))
    taps = ["patch_embed", "blocks.0"]
    inverses = fit_modular(target, images, validation, taps=taps, steps=5, batch_size=8, progress=False)
    judged = inverses.module("blocks.0").history.query("split == 'validation' and module == 'blocks.0'")["loss"]
    assert judged.max() < 1.05 * judged.iloc[0]


def test_the_chain_that_is_returned_is_the_one_that_was_validated(vit) -> None:
    images, held_out = _shown(vit), _shown(vit, 12, seed=1)
    modules = fit_modular(vit, images, held_out, **{**QUICK, "steps": 10, "learning_rate": 0.05})
    history = {tap: stage.history for tap, stage in modules.modules.items()}
    validated = {tap: rows[rows.split == "validation"].set_index("step").loss for tap, rows in history.items()}
    means = sum(validated.values()) / len(validated)
    unit = modules.module(vit.taps[0]).variance
    recorded = vit.record(held_out)
    for tap in vit.taps:
        error = float(F.mse_loss(modules[tap](recorded[tap]), held_out)) / unit
        assert error == pytest.approx(validated[tap][means.idxmin()], rel=1e-5), tap
        assert modules.module(tap).header.validation_loss == pytest.approx(error, rel=1e-5)


def test_the_same_seed_gives_the_same_inverse_and_neither_target_nor_random_state_moves(vit) -> None:
    before, state, device = vit.weights_hash, torch.get_rng_state(), vit.device
    runs = [fit_modular(vit, _shown(vit), _shown(vit, 5, 1), chain_fraction=0.5, seed=4, **QUICK) for _ in range(2)]
    for tap in vit.taps:
        assert _same(runs[0].module(tap), runs[1].module(tap))
    vit.__dict__.pop("weights_hash")
    assert (vit.weights_hash, vit.device) == (before, device)
    assert torch.equal(state, torch.get_rng_state())


def test_chain_fraction_changes_what_lower_modules_learn_from(vit) -> None:
    plain, chained = (fit_modular(vit, _shown(vit), chain_fraction=share, **QUICK) for share in (0.0, 1.0))
    top, low = vit.taps[-1], vit.taps[0]
    assert _same(plain.module(top), chained.module(top))
    assert not _same(plain.module(low), chained.module(low))
    with pytest.raises(BacksightError, match="chain_fraction"):
        fit_modular(vit, _shown(vit), chain_fraction=1.5, **QUICK)


@pytest.mark.parametrize(("size", "count"), [(32, 48), (128, 32)])
def test_of_large_pictures_fewer_choose_the_weights(size: int, count: int, monkeypatch) -> None:
    """A chain from every tap runs on each of them."""
    target, judged = small_timm("ViT", img_size=size), []
    monkeypatch.setattr(fitting, "_kept", lambda target, taps, images: judged.append(len(images)) or (lambda: []))
    monkeypatch.setattr(fitting, "_validated", lambda inverses, recorded: dict.fromkeys(inverses, 1.0))
    fit_direct(target, _shown(target), _shown(target, 48, seed=1), **{**QUICK, "steps": 1, "ridge_images": 0})
    assert judged == [count]


def test_polish_is_a_family_of_its_own_leaves_the_modules_and_reads_what_it_uses(detr, monkeypatch) -> None:
    images = _shown(detr)
    modules = fit_modular(detr, images, **QUICK)
    before = {tap: [p.clone() for p in stage.parameters()] for tap, stage in modules.modules.items()}
    read: list[int] = []
    monkeypatch.setattr(fitting, "_sample", lambda images, count, seed: read.append(count) or images)
    settings = {"steps": 3, "batch_size": 12, "progress": False}
    polished = fit_polish(detr, images, _shown(detr, 8, seed=1), modules=modules, **settings)
    assert read == [fitting.VALIDATION_IMAGES]
    assert polished.family == "modular_polished"
    for tap, stage in polished.modules.items():
        assert stage.header.steps == 5
        assert _same(stage.residual, modules.module(tap).residual) == (tap == "backbone")  # not part of the chain
        assert all(torch.equal(p, q) for p, q in zip(before[tap], modules.module(tap).parameters(), strict=True))
    broken = Inverses({tap: stage for tap, stage in modules.modules.items() if tap != "projection"})
    with pytest.raises(BacksightError, match="no chain"):
        fit_polish(detr, images, modules=broken, **settings)


def test_epochs_and_the_share_that_is_seen(vit) -> None:
    images = _shown(vit, 23)
    settings = {key: value for key, value in QUICK.items() if key != "steps"}
    inverse = fit_direct(vit, images, taps="blocks.0", epochs=2, **settings).module("blocks.0")
    assert inverse.header.steps == 12
    assert "seen 2.09 times" in inverse.header.data
    inverse = fit_direct(vit, images, taps="blocks.0", steps=1, **settings).module("blocks.0")
    assert "17.4% of them seen" in inverse.header.data
    with pytest.raises(BacksightError, match="epochs"):
        fit_direct(vit, images, epochs=1, **QUICK)


def test_a_batch_that_processes_cannot_share_is_refused(vit, monkeypatch) -> None:
    monkeypatch.setattr(fitting, "processes", lambda: type("Three", (), {"num_processes": 3}))
    with pytest.raises(BacksightError, match="3 processes cannot share 4 images a batch"):
        fit_direct(vit, _shown(vit), **QUICK)


def test_a_fit_resumes_and_not_on_other_images_of_the_same_name_and_number(vit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fitting, "train", partial(train, checkpoint_every=2))
    settings = {**QUICK, "taps": ["blocks.0"], "steps": 6}
    whole = fit_direct(vit, _shown(vit), **settings)

    class Stopping(TimmTarget):
        calls = 0

        def record(self, *arguments, **options):
            Stopping.calls += 1
            if Stopping.calls == 6:
                raise KeyboardInterrupt
            return super().record(*arguments, **options)

    settings |= {
        "checkpoint": tmp_path / "fit.safetensors",
        "starts": {("blocks.0", "pixels"): whole["blocks.0"].linear},
    }
    with pytest.raises(KeyboardInterrupt):
        fit_direct(Stopping(vit.model, vit.name, vit.weights, vit.preprocessing), _shown(vit), **settings)
    assert settings["checkpoint"].exists()
    with pytest.raises(BacksightError, match="data"):
        fit_direct(vit, _shown(vit, seed=9), **settings)
    resumed = fit_direct(vit, _shown(vit), **settings)
    assert _same(whole["blocks.0"], resumed["blocks.0"])


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_validation_images_are_counted_once(vit, monkeypatch, kept_bytes: int) -> None:
    """Also where the last batch is smaller, and whether what the target makes of them is kept or not."""
    monkeypatch.setattr(fitting, "KEPT_BYTES", kept_bytes)
    images = _shown(vit, 10)
    inverses = fit_direct(vit, images, **{**QUICK, "steps": 0}).modules
    monkeypatch.setattr(fitting, "RECORDING_BATCH", 4)
    recorded = fitting._kept(vit, list(inverses), images)
    assert isinstance(recorded(), list) == bool(kept_bytes)
    losses, held = fitting._validated(inverses, recorded()), vit.record(images)
    for tap, inverse in inverses.items():
        assert losses[tap] == pytest.approx(float(F.mse_loss(inverse(held[tap]), images)) / inverse.variance)


def test_running_moments_keep_prefix_tokens_apart() -> None:
    values = torch.randn(50, 5, 3, generator=torch.Generator().manual_seed(0))
    values[:, 0] += 10
    moments = moments_of(sum(power_sums(values[part], 1) for part in (slice(0, 7), slice(7, 50))), 5)
    grid = values[:, 1:].flatten(0, 1)
    torch.testing.assert_close(moments.mean, torch.stack([values[:, 0].mean(0), grid.mean(0)]))
    deviation = torch.stack([values[:, 0].std(0, unbiased=False), grid.std(0, unbiased=False)])
    torch.testing.assert_close(moments.deviation, deviation)
    assert moments.variance == pytest.approx(float((deviation[0].square() + 4 * deviation[1].square()).mean()) / 5)


def test_bfloat16_is_for_networks_and_not_for_starts(vit: TimmTarget) -> None:
    """Either way the closed-form start keeps its digits, and the training its way."""
    shown = _shown(vit, 48)
    held = vit.record(shown)
    fits = {
        (steps, half): fit_direct(vit, shown, **(QUICK | {"steps": steps}), bfloat16=half)
        for steps in (0, 20)
        for half in (False, True)
    }
    with torch.no_grad():
        loss = {key: [float(F.mse_loss(it[tap](held[tap]), shown)) for tap in it] for key, it in fits.items()}
    assert loss[0, True] == loss[0, False]
    assert loss[20, True] == pytest.approx(loss[20, False], rel=0.05)
    assert all(after != before for after, before in zip(loss[20, True], loss[0, True], strict=True))
