"""Inverses: untrained they are the ridge map, trained they are better, and ends that do not meet are refused."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from backsight.errors import BacksightError
from backsight.inverses.files import read, read_header, read_tensors, write, write_tensors
from backsight.inverses.linear import Form, fit_linear_pairs
from backsight.inverses.module import (
    RESIDUALS,
    Chain,
    Inverse,
    Upsampling,
    design_for,
    header_for,
)
from backsight.representation import Queries, Tokens
from backsight.targets import module_target
from backsight.targets.base import Preprocessing, Stage, seeded
from backsight.targets.detr import Detr
from backsight.targets.vit import TimmTransformer
from backsight.training.fit import fit_direct, fit_modular

QUICK = {"steps": 2, "batch_size": 4, "ridge_images": 48, "progress": False}


def _images(count: int = 48, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth colour fields: what a token holds says something of its pixels."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def _vit(seed: int = 0, **changes) -> TimmTransformer:
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    with seeded(seed):
        model = VisionTransformer(**{**tiny, **changes})
    return TimmTransformer(model, "tiny-vit", "random")


def _detr() -> Detr:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    with seeded(0):
        model = DetrForObjectDetection(
            DetrConfig(
                backbone_config=backbone,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                num_queries=5,
                id2label={0: "disc", 1: "ring"},
            )
        )
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 32))
    return Detr(model, "tiny-detr", preprocessing, "random", ("disc", "ring"))


@pytest.fixture(scope="module")
def vit() -> TimmTransformer:
    return _vit()


@pytest.fixture(scope="module")
def detr() -> Detr:
    return _detr()


@pytest.fixture(scope="module")
def vit_modules(vit) -> dict[str, Inverse]:
    return fit_modular(vit, _images(), **QUICK).modules


@pytest.fixture(scope="module")
def detr_modules(detr) -> dict[str, Inverse]:
    return fit_modular(detr, _images(), _images(8, seed=1), **QUICK).modules


VITS = {
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "non-square": {"img_size": (16, 40)},
    "patch of 14": {"img_size": 28, "patch_size": 14},
    "non-square patches": {"img_size": 32, "patch_size": (4, 16)},
}


@pytest.mark.parametrize("changes", VITS.values(), ids=VITS.keys())
def test_shapes_follow_the_representation(changes: dict) -> None:
    target = _vit(**changes)
    height, width = target.image_size
    images = _images(8, height, width)
    direct = fit_direct(target, images, taps=["blocks.1"], **{**QUICK, "steps": 1})
    modules = fit_modular(target, images, **{**QUICK, "steps": 1}).modules
    recorded = target.record(images[:1])
    for inverse in (direct["blocks.1"], Chain(modules, "blocks.1")):
        made = inverse(recorded["blocks.1"])
        assert made.shape == (1, 3, height, width)
        assert 0 <= made.min().item() <= made.max().item() <= 1
    for tap, made in Chain(modules, target.taps[-1]).intermediate(recorded[target.taps[-1]]).items():
        if tap != "pixels":
            assert made.signature == recorded[tap].signature


@pytest.mark.parametrize(
    ("grid", "patch", "size"),
    [
        ((2, 3), (8, 8), (16, 24)),
        ((1, 1), (32, 32), (32, 32)),
        ((3, 2), (14, 14), (41, 27)),
        ((4, 4), (1, 1), (4, 4)),
        ((2, 2), (7, 3), (14, 6)),
    ],
)
def test_upsampling_reaches_any_size(grid, patch, size) -> None:
    upsampling = Upsampling(Form("tokens", 8, (grid,), prefix=1), 3, size, patch, width=32, depth=1)
    assert upsampling(torch.randn(2, 1 + grid[0] * grid[1], 8)).shape == (2, 3, *size)


def test_several_grids_are_read_together() -> None:
    upsampling = Upsampling(Form("tokens", 8, ((4, 6), (2, 3))), 3, (32, 48), (8, 8), width=32, depth=1)
    assert upsampling(torch.randn(2, 30, 8)).shape == (2, 3, 32, 48)


def test_detr_has_a_module_of_the_right_kind_for_every_stage(detr, detr_modules) -> None:
    kinds = {tap: module.design.kind for tap, module in detr_modules.items()}
    assert kinds == {
        "backbone": "upsampling",
        "projection": "upsampling",
        "encoder.layers.0": "encoder",
        "encoder.layers.1": "encoder",
        "decoder.layers.0": "decoder",
        "decoder.layers.1": "queries",
        "decoder.layernorm": "mlp",
        "predictions": "heads",
    }
    recorded = detr.record(_images(1))
    made = Chain(detr_modules, "predictions").intermediate(recorded["predictions"])
    assert list(made) == [*reversed(detr.taps[1:-1]), "pixels"]  # a projection ends where the backbone does
    for tap in detr.taps[1:-1]:
        assert made[tap].signature == recorded[tap].signature
        position = getattr(recorded[tap], "position", None)
        assert (getattr(made[tap], "position", None) is None) == (position is None), tap
    assert torch.equal(made["encoder.layers.1"].position, recorded["encoder.layers.1"].position)


def test_components_and_fine_steps_work_as_taps(vit, detr) -> None:
    for target, taps in ((detr, "components"), (vit, "fine")):
        modules = fit_modular(target, _images(8), taps=taps, **{**QUICK, "steps": 1}).modules
        last = target.resolve_taps(taps)[-1]
        assert Chain(modules, last)(target.record(_images(2), [last])[last]).shape == (2, 3, 32, 32)


def test_a_cnn_is_inverted_across_its_grids() -> None:
    with seeded(0):
        network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
    target = module_target(network, ["1", "3"], image_size=(16, 24))
    modules = fit_modular(target, _images(8, 16, 24), **QUICK).modules
    assert [module.design.kind for module in modules.values()] == ["upsampling", "convolution"]
    assert modules["3"].linear is not None
    assert modules["3"].linear.layout.patch_of("patches") == (2, 2)
    assert Chain(modules, "3")(target.record(_images(2, 16, 24))["3"]).shape == (2, 3, 16, 24)


def test_padding_is_not_looked_at(detr, detr_modules) -> None:
    images = _images(2)
    padding = torch.zeros(2, 32, 32, dtype=torch.bool)
    padding[1, :, 16:] = True
    tokens = detr.record(images, padding=padding)["encoder.layers.1"]
    assert tokens.padding.any()
    noisy = torch.where(tokens.padding[:, :, None], torch.randn_like(tokens.values), tokens.values)
    inverse = detr_modules["encoder.layers.1"]
    nn.init.normal_(inverse.residual.head[1].weight)
    clean_made, noisy_made = inverse(tokens), inverse(tokens.replace(noisy))
    seen = ~tokens.padding
    torch.testing.assert_close(clean_made.values[seen], noisy_made.values[seen])
    assert torch.equal(noisy_made.padding, tokens.padding)
    queries = detr.record(images, padding=padding)["decoder.layers.0"]
    made = detr_modules["decoder.layers.0"](queries, layout=tokens)
    assert torch.equal(made.padding, tokens.padding)
    assert torch.equal(made.position, tokens.position)
    other = Tokens(torch.zeros(2, 4, 16), ((2, 2),))
    with pytest.raises(BacksightError, match="layout"):
        detr_modules["decoder.layers.0"](queries, layout=other)


def test_a_queries_inverse_never_reads_the_context(detr, detr_modules) -> None:
    queries = detr.record(_images(2))["decoder.layers.0"]
    assert queries.context is not None
    without = Queries(queries.values)
    module = detr_modules["decoder.layers.0"]
    assert torch.equal(module(queries).values, module(without).values)


def test_saved_and_loaded_is_the_same(detr, detr_modules, tmp_path) -> None:
    recorded = detr.record(_images(2))
    for tap, module in detr_modules.items():
        path = write(module, tmp_path / f"{tap}.safetensors")
        state = torch.get_rng_state()
        loaded = read(path, detr)
        assert torch.equal(state, torch.get_rng_state())
        assert loaded.header == module.header == read_header(path)
        assert torch.equal(loaded.raw(recorded[tap]), module.raw(recorded[tap])), tap
    chain = Chain(detr_modules, "predictions")
    full = write(chain, tmp_path / "chain.safetensors")
    wanted = chain(recorded["predictions"])
    assert torch.equal(read(full, detr)(recorded["predictions"]), wanted)
    header = read_header(full)
    assert (header.family, header.source, header.destination) == ("modular", "predictions", "pixels")
    assert "torch" in header.versions


def test_half_precision_halves_the_file_and_not_the_picture(vit, vit_modules, tmp_path) -> None:
    chain, tokens = Chain(vit_modules, "norm"), vit.record(_images(2))["norm"]
    full = write(chain, tmp_path / "chain.safetensors")
    half = write(chain, tmp_path / "half.safetensors", half=True)
    torch.testing.assert_close(read(half, vit)(tokens), chain(tokens), atol=0.02, rtol=0)
    assert half.stat().st_size < 0.75 * full.stat().st_size


def test_linear_inverses_are_saved_by_the_same_functions(vit, tmp_path) -> None:
    images = _images()
    pairs = [("blocks.0", "patch_embed"), ("patch_embed", "pixels")]
    linear = fit_linear_pairs(vit, images, pairs, progress=False)
    modules = {source: linear[source, destination] for source, destination in pairs}
    with pytest.raises(BacksightError, match="does not know its target"):
        write(modules["blocks.0"], tmp_path / "linear.safetensors")
    recorded = vit.record(images[:2])["blocks.0"]
    for inverse in (modules["blocks.0"], Chain(modules, "blocks.0")):
        header = header_for(vit, "linear", inverse.source, inverse.destination, images)
        path = write(inverse, tmp_path / "linear.safetensors")
        loaded, wanted = read(path, vit)(recorded), inverse(recorded)
        assert torch.equal(*(each.values if isinstance(each, Tokens) else each for each in (loaded, wanted)))
        assert read_header(path) == header


def test_other_targets_and_broken_files_are_refused(vit, vit_modules, tmp_path) -> None:
    path = write(vit_modules["blocks.0"], tmp_path / "inverse.safetensors")
    with pytest.raises(BacksightError, match="was made for tiny-vit with the weights"):
        read(path, _vit(seed=1))
    with pytest.raises(BacksightError, match="no inverse at"):
        read(tmp_path / "none.safetensors", vit)
    tensors, metadata = read_tensors(path, "inverse")
    write_tensors(tmp_path / "foreign.safetensors", tensors, {})
    with pytest.raises(BacksightError, match="holds no inverse"):
        read(tmp_path / "foreign.safetensors", vit)
    fewer = {key: tensor for key, tensor in tensors.items() if key != "source_mean"}
    write_tensors(tmp_path / "fewer.safetensors", fewer, metadata)
    with pytest.raises(BacksightError, match="does not fit its own header"):
        read(tmp_path / "fewer.safetensors", vit)
    description = json.loads(metadata["backsight"])
    description["design"]["kind"] = "magic"
    write_tensors(tmp_path / "magic.safetensors", tensors, {"backsight": json.dumps(description)})
    with pytest.raises(BacksightError, match="does not fit its own header"):
        read(tmp_path / "magic.safetensors", vit)
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BacksightError, match="damaged"):
        read(tmp_path / "short.safetensors", vit)


def test_chain_ends_must_meet(vit, vit_modules) -> None:
    with pytest.raises(BacksightError, match=r"no module for its start 'blocks\.7'; nearest: blocks"):
        Chain(vit_modules, "blocks.7")
    other = fit_modular(_vit(seed=1), _images(8), **{**QUICK, "steps": 0}).modules
    with pytest.raises(BacksightError, match="different weights"):
        Chain({**vit_modules, "patch_embed": other["patch_embed"]}, "norm")
    larger = _vit(img_size=40)
    wider = fit_modular(larger, _images(8, 40, 40), **{**QUICK, "steps": 0}).modules
    with pytest.raises(BacksightError, match="breaks at 'patch_embed'"):
        Chain({**vit_modules, "patch_embed": wider["patch_embed"]}, "norm")
    part = Chain({tap: vit_modules[tap] for tap in ("norm", "blocks.1")}, "norm")
    assert part.destination == "blocks.0"


def test_cross_application_where_forms_agree(vit, vit_modules, detr) -> None:
    recorded = vit.record(_images(2))
    assert vit_modules["patch_embed"](recorded["norm"]).shape == (2, 3, 32, 32)
    with pytest.raises(BacksightError, match="reads 1 prefix and 4 x 4 grid tokens of 32 channels, but was given"):
        vit_modules["patch_embed"](detr.record(_images(2))["backbone"])


def test_no_module_from_tokens_to_queries() -> None:
    tokens, queries = Form("tokens", 8, ((2, 2),)), Form("queries", 8, count=3)
    with pytest.raises(BacksightError, match="no inverse module from 0 prefix"):
        design_for(tokens, queries, Stage("blocks", 1, 2, 16))
    assert {design_for(queries, tokens).kind, design_for(tokens, tokens).kind} <= set(RESIDUALS)
