"""timm's families by name: taps, layouts, the rest of the pass, and loading, with random weights.

The smallest architectures of each family are test_families.py's; all modules of timm are benchmarks/zoo.py's.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from targets.examples import small_timm
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Tokens
from backsight.targets import load_target
from backsight.targets.axes import Axes, guess
from backsight.targets.base import Preprocessing, Target, seeded
from backsight.targets.timm_models import TimmTarget

SHALLOW = {"depth": 3}
STAGES = {"depths": (1, 1, 3, 1)}

# Name, side of the images, arguments, "components", prefix tokens at the first and at the last tap.
FAMILIES: dict[str, tuple[str, int, dict[str, object], list[str], tuple[int, int]]] = {
    "ViT": ("test_vit", 64, {}, ["patch_embed", "blocks.5"], (1, 1)),
    "DeiT-3": ("deit3_small_patch16_224", 32, SHALLOW, ["patch_embed", "blocks.2"], (1, 1)),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", 28, SHALLOW, ["patch_embed", "blocks.2"], (5, 5)),
    "Swin": ("swin_tiny_patch4_window7_224", 64, STAGES, ["patch_embed", *(f"layers.{i}" for i in range(4))], (0, 0)),
    "Swin V2": ("swinv2_tiny_window8_256", 64, STAGES, ["patch_embed", *(f"layers.{i}" for i in range(4))], (0, 0)),
    "BEiT": (
        "beit_base_patch16_224",
        32,
        {"depth": 3, "embed_dim": 96, "num_heads": 3},
        ["patch_embed", "blocks.2"],
        (1, 1),
    ),
    "EVA": ("eva02_tiny_patch14_224", 28, SHALLOW, ["patch_embed", "blocks.2"], (1, 1)),
    "CaiT": ("cait_xxs24_224", 32, SHALLOW, ["patch_embed", "blocks.2"], (0, 1)),
    "XCiT": ("xcit_nano_12_p16_224", 32, SHALLOW, ["patch_embed", "blocks.2", "cls_attn_blocks.1"], (0, 1)),
    "TNT": ("tnt_s_patch16_224", 32, SHALLOW, ["blocks.0", "blocks.2"], (1, 1)),
    "PoolFormer": ("poolformer_s12", 64, {}, ["stem", *(f"stages.{i}" for i in range(4))], (0, 0)),
    "ConvNeXt": ("test_convnext", 64, {}, ["stem", *(f"stages.{i}" for i in range(4))], (0, 0)),
    "CrossViT": ("crossvit_tiny_240", 120, {}, ["blocks.0", "blocks.2"], (1, 1)),
    "Hiera": (
        "hiera_tiny_224",
        64,
        {"stages": (1, 2, 2, 1)},
        ["patch_embed", *(f"blocks.{i}" for i in (0, 2, 4, 5))],
        (0, 0),
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def target_of(family: str) -> Target:
    name, side, arguments, _, _ = FAMILIES[family]
    target = load_target(name, pretrained=False, image_size=side, **arguments)
    scatter(target.model)
    return target


def scatter(model: nn.Module) -> None:
    """Random biases, scales and tokens too, so that no step is an identity by its initial value."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def images_for(target: Target, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *target.image_size, generator=torch.Generator().manual_seed(0))


def some(taps: Sequence[str]) -> list[str]:
    """The ends and the middle: a pass for each of a deep model's taps takes too long."""
    return list(dict.fromkeys([taps[0], taps[1], taps[len(taps) // 2], taps[-2], taps[-1]]))


@each_family
def test_taps(family: str) -> None:
    target, (*_, components, prefixes) = target_of(family), FAMILIES[family]
    assert list(target.tap_set("components")) == components
    ends = target.record(images_for(target, 1), [target.taps[0], target.taps[-1]])
    assert tuple(each.prefix for each in ends.values() if isinstance(each, Tokens)) == prefixes
    assert target.kind == "classifier"


@each_family
def test_taps_hold_what_timm_calls_the_intermediates(family: str) -> None:
    target = target_of(family)
    images = images_for(target)
    with torch.no_grad():
        known = target.model.forward_intermediates(
            target.preprocessing.normalise(images), norm=False, output_fmt="NCHW", intermediates_only=True
        )
    maps = [each.maps()[0] for each in target.record(images).values() if isinstance(each, Tokens)]
    branches = 2 if family == "CrossViT" else 1  # whose second branch travels in the context
    for intermediate in known[: len(known) // branches]:
        assert any(
            each.shape == intermediate.shape and torch.allclose(each, intermediate, atol=1e-4, rtol=1e-4)
            for each in maps
        )


def test_stages_say_what_lies_between() -> None:
    swin = target_of("Swin")
    assert swin.stage("patch_embed", "pixels").kind == "patch_embedding"
    assert swin.stage("layers.2", "layers.1").depth == 3
    assert (swin.stage("layers.3", "layers.2").kind, swin.stage("layers.3", "layers.2").heads) == ("blocks", 24)
    assert swin.stage("layers.3", "layers.2").hidden == 3072
    assert swin.stage("norm", "layers.3").kind == "norm"
    assert target_of("ConvNeXt").stage("stages.2", "stages.1").kind == "convolution"
    assert target_of("XCiT").stage("blocks.2", "blocks.1").heads == 4
    assert target_of("CaiT").stage("norm", "blocks.2").depth == 2  # the blocks of class attention
    assert swin.reduction == (4, 4)


def test_other_sizes() -> None:
    target = target_of("ConvNeXt")
    recorded = target.record(images := torch.rand(1, 3, 96, 128))
    assert recorded["stages.1"].grids == ((12, 16),)
    for tap, representation in recorded.items():
        assert (target.from_tap(tap, representation) - target(images)).abs().max() <= 1e-5, tap
    # A target that has not seen the size finds it again from the grid.
    other = load_target("test_convnext", pretrained=False, image_size=64)
    other.model.load_state_dict(target.model.state_dict())
    assert (other.from_tap("stages.2", recorded["stages.2"]) - target(images)).abs().max() <= 1e-5
    with pytest.raises(BacksightError, match=r"tnt_s_patch16_224 does not take images of \(48, 32\).*\(32, 32\)"):
        target_of("TNT").record(torch.rand(1, 3, 48, 32))


def test_what_is_fed_back_has_to_fit() -> None:
    target = target_of("TNT")
    tokens = target.record(images_for(target), ["blocks.1"])["blocks.1"]
    assert isinstance(tokens, Tokens)
    assert next(iter(tokens.context.values())).shape[0] == 2
    with pytest.raises(BacksightError, match=r"also reads \[0\]"):
        target.from_tap("blocks.1", Tokens(tokens.values, tokens.grids, tokens.prefix))
    with pytest.raises(BacksightError, match="384 channels"):
        target.from_tap("blocks.1", Tokens(tokens.values[..., :7], tokens.grids, tokens.prefix))
    with pytest.raises(BacksightError, match="1 prefix token"):
        target.from_tap("blocks.1", Tokens(tokens.patches, tokens.grids, 0, context=tokens.context))
    with pytest.raises(BacksightError, match="padd"):
        target(images_for(target), torch.ones(2, 32, 32, dtype=torch.bool))


def test_axes_are_guessed_from_what_the_model_calls_its_intermediates() -> None:
    forms = [((8, 8), 16)]
    assert guess((2, 16, 8, 8), forms, (64, 64)) == Axes("bchw", (8, 8))
    assert guess((2, 8, 8, 16), forms, (64, 64)) == Axes("bhwc", (8, 8))
    assert guess((2, 65, 16), forms, (64, 64)) == Axes("bnc", (8, 8), 1)
    assert guess((2, 16, 64), forms, (64, 64)) == Axes("bcn", (8, 8))
    assert guess((2, 16, 4, 64), forms, (64, 64)) is None  # tokens in patches are no picture
    assert guess((2, 1, 256), forms, (64, 64)) is None  # a class token alone
    assert guess((2, 7), forms, (64, 64)) is None


def test_models_without_a_cut_are_refused() -> None:
    class Around(nn.Module):
        """Two streams of which no module returns both."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Conv2d(3, 3, 1))])

        def forward(self, images: Tensor) -> Tensor:
            return (self.blocks[0](images) + self.blocks[1](images)).mean((2, 3))

    with pytest.raises(BacksightError, match="no module of this Around returns a picture through which everything"):
        TimmTarget(Around(), "mine", "random", Preprocessing((0.5,) * 3, (0.5,) * 3, (8, 8)))


@pytest.mark.parametrize(
    ("name", "said"), [("test_convnext.r160_in1k", "hf download"), ("test_convnext.nonsense", r"no weights|r160_in1k")]
)
def test_weights_that_are_not_there(name: str, said: str) -> None:
    with pytest.raises(BacksightError, match=said):
        load_target(name)


def test_checkpoints(tmp_path: Path) -> None:
    with seeded(0):
        model = timm.create_model("test_convnext", num_classes=7)
    file = tmp_path / "mine.safetensors"
    save_file(model.state_dict(), file)
    name = f"test_convnext@{file}"
    target = load_target(name)
    assert target.weights == name
    images = images_for(target, 1)
    with torch.no_grad():
        wanted = model.eval()(target.preprocessing.normalise(images))
    assert wanted.shape == (1, 7)
    assert torch.allclose(target(images), wanted, atol=1e-6)
    assert target.untrained(1).model.num_classes == 7

    state = {key: value for key, value in model.state_dict().items() if not key.startswith("stages.3.blocks.0.norm")}
    state["stem.0.weight"] = torch.ones(24, 3, 5, 5)
    save_file(state, file)
    with pytest.raises(BacksightError, match=r"missing \(stages\.3\.blocks\.0\.norm.*of another shape \(stem\.0"):
        load_target(name)


def test_descriptions_of_architectures(tmp_path: Path) -> None:
    """As the shipped targets are: the architecture, its arguments, and the weights."""
    made = small_timm("Swin")
    folder = tmp_path / "mine"
    folder.mkdir()
    save_file(made.model.state_dict(), folder / "model.safetensors")
    arguments = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
    config = {
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": {**arguments, "window_size": 4, "num_classes": 5},
        "label_names": list("abcde"),
        "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input_size": [3, 64, 64]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    target = load_target(str(folder))
    assert target.classes == tuple("abcde")
    assert target.image_size == (64, 64)
    images = images_for(target)
    assert torch.equal(target(images), made(images))
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "swin_tinny"}))
    with pytest.raises(BacksightError, match="swin_tinny"):
        load_target(str(folder))
