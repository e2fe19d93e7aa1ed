"""What users' models really do: each is read rightly, replayed exactly, or refused with the reason."""

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from backsight.errors import BacksightError
from backsight.targets import module_target, suggest_taps
from backsight.targets.axes import Axes, readings, squares_found, with_squares
from backsight.targets.base import Preprocessing, seeded
from backsight.targets.hooks import Place, observe, playing, recording
from backsight.targets.timm_models import TimmTarget

SIZE = (64, 64)
IMAGES = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


class Embedded(nn.Module):
    """A patch embedding of 8 x 8 maps, something between, and a linear head on the mean."""

    def __init__(self, between=lambda x: x, **parts: nn.Module) -> None:
        super().__init__()
        self.embed, self.between = nn.Conv2d(3, 8, 8, 8), between
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.between(self.embed(images)).mean((2, 3)))


def made(build) -> nn.Module:
    with seeded(0):
        return build().eval()


def replays(target, tap: str, tolerance: float = 1e-5) -> None:
    """Two images' representations, swapped, give the outputs swapped; the representation stays as it was."""
    tokens, output = target.record(IMAGES, [tap])[tap], target(IMAGES)
    before = tokens.values.clone()
    behind = target.from_tap(tap, tokens.index([1, 0]))
    assert (output[0] - output[1]).abs().max() > 10 * tolerance * output.abs().max()
    assert (behind - output.flip(0)).abs().max() <= tolerance * output.abs().max()
    assert torch.equal(tokens.values, before)


# The hook engine


def test_what_is_played_is_a_copy_also_for_the_models_own_hooks() -> None:
    model, kept = made(lambda: Embedded(lambda x: x.relu_())), {}
    model.embed.register_forward_hook(lambda module, given, output: kept.__setitem__("x", output))
    with recording(model, {"embed": Place("embed")}) as seen:
        model(IMAGES)
    value = seen["embed"].detach()
    before = value.clone()
    with playing(model, {Place("embed"): value}):
        model(torch.zeros_like(IMAGES))
    assert torch.equal(value, before)
    assert torch.equal(kept["x"], before.relu())
    assert len(model.embed._forward_hooks) == 1


def test_hooks_are_removed_after_a_failure() -> None:
    model = made(Embedded)
    for attempt in (
        lambda: observe(model, lambda images: model(images[:, :1]), IMAGES),
        lambda: model(IMAGES[:, :1]),
    ):
        with pytest.raises(RuntimeError), recording(model, {"a": Place("embed")}), playing(model, {}):
            attempt()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Pair(nn.Module):
    """An earlier tensor is returned once more, beside the output and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.deep = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 2, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(images)
        deep = self.deep(hidden)
        return {"hidden": hidden, "last": deep, "number": deep.mean()}


class Aside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Pair(), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images)["last"].mean((2, 3)))


def test_a_tensor_is_a_cut_only_before_it_is_read() -> None:
    model = made(Aside)
    table = suggest_taps(model, SIZE).set_index("tap")
    assert table.loc[["body.embed", "body", "body[hidden]"], "cut"].tolist() == [True, True, False]
    assert not table.loc["body[hidden]", "recommended"]
    target = module_target(model, ["body.embed", "body", "body[hidden]"], image_size=SIZE)
    for tap in target.taps:
        replays(target, tap)


# In place, own hooks, small outputs, constants


def inplace(x: Tensor) -> Tensor:
    x += 1
    return x.relu_()


def test_an_operation_in_place_behind_the_tap() -> None:
    replays(module_target(made(lambda: Embedded(inplace)), ["embed"], image_size=SIZE), "embed")


class Hooked(nn.Module):
    """It takes its features by a hook of its own, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.deep, self.head, self.seen = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4), {}
        self.embed.register_forward_hook(lambda module, given, output: self.seen.__setitem__("embed", output))

    def forward(self, images: Tensor) -> Tensor:
        self.deep(self.embed(images))
        return self.head(self.seen["embed"].mean((2, 3)))


def test_a_model_with_hooks_of_its_own() -> None:
    replays(module_target(made(Hooked), ["embed"], image_size=SIZE), "embed")


class Around(Embedded):
    def forward(self, images: Tensor) -> Tensor:
        return 1e-7 * self.head((self.embed(images) + 3 * images.detach().mean((1, 2, 3), keepdim=True)).mean((2, 3)))


def test_whether_the_image_still_matters_is_asked_in_the_outputs_own_range() -> None:
    target = module_target(made(Around), ["embed"], image_size=SIZE)
    with pytest.raises(BacksightError, match="goes around"):
        target.from_tap("embed", target.record(IMAGES)["embed"])


def test_what_is_the_same_for_every_image_is_not_recommended() -> None:
    model = made(lambda: Embedded(lambda x: x))
    model.between = zero = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    nn.init.zeros_(zero[1].weight)
    assert "between.1" not in module_target(model.eval(), image_size=SIZE).taps


# Where gradients cannot be had


class Nested(Embedded):
    """The images are written into a padded batch, as DETR's NestedTensor does."""

    def forward(self, images: Tensor) -> Tensor:
        padded = torch.zeros_like(images)
        for image, place in zip(images, padded, strict=True):
            place.copy_(image)
        return super().forward(padded)


class Prepared(Embedded):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            images = (images - 0.5) / 0.2
        return super().forward(images)


class Ungraded(Embedded):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


@pytest.mark.parametrize("model", [Nested, Prepared, Ungraded])
def test_cuts_are_found_behind_the_first_module_where_autograd_loses_the_images(model: type[nn.Module]) -> None:
    target = module_target(made(model), image_size=SIZE)
    assert target.taps == ("embed",)
    replays(target, "embed")


def test_the_reason_is_said_where_there_are_no_cuts() -> None:
    class Discrete(Embedded):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).argmax(1).float()[:, None]

    with pytest.raises(BacksightError, match="no gradient with respect to the images"):
        module_target(made(Discrete), image_size=SIZE)
    target = module_target(made(Discrete), ["embed"], image_size=SIZE)  # tried out
    assert torch.equal(target.from_tap("embed", target.record(IMAGES)["embed"]), target(IMAGES))


def test_models_that_cannot_run_are_named() -> None:
    with torch.device("meta"):
        model = Embedded()
    with pytest.raises(BacksightError, match=r"embed\.weight lies on the meta device"):
        module_target(model, image_size=SIZE)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = transformers.CLIPConfig(
        vision_config={**vision, "image_size": 64, "patch_size": 16}, text_config={**vision, "vocab_size": 99}
    )
    with pytest.raises(BacksightError, match=r"give its \.vision_model"):
        module_target(transformers.CLIPModel(config).eval(), image_size=SIZE)


def test_one_answer_for_several_images_is_no_output() -> None:
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, min_size=64, max_size=96)
    target = module_target(model.eval(), ["backbone.body"], image_size=SIZE, axes=None)
    with pytest.raises(BacksightError, match="axis of images"):
        target(IMAGES)
    assert target.record(IMAGES)["backbone.body"].batch == 2


def test_random_draws_are_said() -> None:
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=64
    )
    with pytest.warns(UserWarning, match="draws random numbers"):
        module_target(
            transformers.ViTMAEModel(config).eval(), ["layernorm"], grids={"layernorm": (2, 2)}, image_size=SIZE
        )


class Stream(nn.Module):
    """Residual streams that no module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return self.head(self.norm(x).mean(1))


def test_taps_on_what_modules_are_given() -> None:
    target = module_target(made(Stream), image_size=SIZE)
    assert [tap for tap in target.taps if tap.startswith("layers")] == [
        f"layers.{i}.{j}@in" for i in (0, 1) for j in (0, 1)
    ]
    for tap in target.taps:
        replays(target, tap)


# Axes


def token_model(function, width: int = 64) -> nn.Module:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.tap, self.head = nn.Conv2d(3, width, 8, 8), nn.Linear(width, width), nn.Linear(width, 4)
            self.register_buffer("registers", torch.randn(1, 9, width))

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.embed(images).flatten(2).transpose(1, 2)
            return self.head(self.tap(function(tokens, self.registers.expand(len(images), -1, -1))).mean(1))

    return made(Tokens)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r: torch.cat([x, r[:, :4]], 1),
        lambda x, r: x[:, :44],
        lambda x, r: torch.softmax(x[:, :25] @ x.transpose(1, 2), -1) @ x,
        lambda x, r: torch.cat([x, x.unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2)], 1),
    ],
    ids=["registers behind", "pruned", "queries", "two levels"],
)
def test_tokens_that_are_no_grid_are_not_read_as_one(function) -> None:
    with pytest.raises(BacksightError, match="no grid"):
        module_target(token_model(function), ["tap"], image_size=SIZE)


def read(model: nn.Module, tap: str, size=SIZE) -> list:
    return module_target(model, [tap], image_size=size).describe()[["axes", "grid", "prefix"]].values.tolist()[0]


def test_tokens_that_are_a_grid_are_read_as_it() -> None:
    assert read(token_model(lambda x, r: torch.cat([r[:, :5], x], 1)), "tap") == ["bnc", "8 × 8", 5]
    assert read(token_model(lambda x, r: x.mean(1, keepdim=True)), "tap") == ["bnc", "1 × 1", 0]
    with pytest.warns(UserWarning, match="unusual"):
        assert read(token_model(lambda x, r: torch.cat([r, x], 1)), "tap") == ["bnc", "8 × 8", 9]


def test_registers_at_small_and_non_square_sizes() -> None:
    config = transformers.DINOv3ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96, num_register_tokens=4
    )
    assert read(made(lambda: transformers.DINOv3ViTModel(config)), "norm", (64, 96)) == ["bnc", "4 × 6", 5]
    vit = made(lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, reg_tokens=4))
    assert read(vit, "norm", (32, 32)) == ["bnc", "2 × 2", 5]


def test_detectors_queries_are_no_picture() -> None:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.DetrConfig(num_queries=100, backbone_config=backbone, **sizes, **heads)
    table = suggest_taps(made(lambda: transformers.DetrForObjectDetection(config)), SIZE)
    assert set(table[table["shape"].str.startswith("B × 100")]["form"]) == {"other"}


def test_axes_of_equal_numbers() -> None:
    """As many channels as the map is high and wide: a change of the picture says which is which."""
    last = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.Unflatten(2, (16, 16)), nn.AdaptiveAvgPool2d(1))
    assert read(made(lambda: last), "0") == ["bchw", "16 × 16", 0]
    shapes = {"bchw": (10, 16, 16, 16), "bhwc": (10, 16, 16, 16)}
    picture = torch.cat([with_squares(torch.rand(1, 3, 16, 16)), torch.rand(1, 3, 16, 16)]).repeat(1, 6, 1, 1)[:, :16]
    for order, shape in shapes.items():
        tensor = picture if order == "bchw" else picture.permute(0, 2, 3, 1)
        assert tensor.shape == shape
        best = max(readings(shape, 0, (16, 16)), key=lambda axes, tensor=tensor: squares_found(axes, tensor)[0])
        assert best == Axes(order, (16, 16))  # type: ignore[arg-type]


# Random weights


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, lambda c: prune.l1_unstructured(c, "weight", 0.5)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_random_weights_are_never_the_trained_ones(wrap) -> None:
    model = made(lambda: nn.Sequential(wrap(nn.Conv2d(3, 8, 8, 8, bias=False)), nn.AdaptiveAvgPool2d(1)))
    target = module_target(model, ["0"], image_size=SIZE)
    with pytest.raises(BacksightError, match=r"0\.weight.* cannot be drawn anew"):
        target.untrained(0)


def test_further_parameters_and_learned_buffers_are_not_kept() -> None:
    class Gated(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 4)
            self.gate = nn.Parameter(torch.randn(4))
            self.register_buffer("codebook", torch.randn(4))

    model = made(lambda: Embedded())
    model.head = Gated()
    with pytest.raises(BacksightError, match=r"head\.gate, head\.codebook"):
        module_target(model.eval(), ["embed"], image_size=SIZE).untrained(0)


def test_weights_of_quantised_models_have_a_hash() -> None:
    model = torch.ao.quantization.quantize_dynamic(made(Embedded), {nn.Linear}, dtype=torch.qint8)
    target = module_target(model, ["embed"], image_size=SIZE)
    assert len(target.weights_hash) == 16
    assert target.weights_hash != module_target(made(Embedded), ["embed"], image_size=SIZE).weights_hash


# timm's ViT, precision, the table of taps


def vit(**arguments) -> TimmTarget:
    sizes = {"img_size": 98, "patch_size": 14, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 4}
    model = made(lambda: timm.create_model("vit_tiny_patch16_224", **{**sizes, **arguments}))
    return TimmTarget(model, "tiny", "random", Preprocessing((0.5,) * 3, (0.5,) * 3, model.patch_embed.img_size))


def test_a_vit_that_pads_takes_any_size() -> None:
    target = vit(dynamic_img_size=True, dynamic_img_pad=True)
    images = torch.rand(1, 3, 100, 120)
    tokens = target.record(images)["blocks.0"]
    assert tokens.grids == ((8, 9),)
    assert torch.allclose(target.from_tap("blocks.0", tokens), target(images), atol=1e-5)


def test_a_strip_that_no_token_sees_is_said() -> None:
    with pytest.warns(UserWarning, match="last 2 rows and 2 columns"):
        target = vit(img_size=100)
    assert target.reduction == (14, 14)


def test_half_precision_is_inside_and_float32_outside() -> None:
    target = vit()
    images = torch.rand(2, 3, 98, 98)
    exact, digest = target.record(images)["blocks.0"].values, target.weights_hash
    rounded = target.to(precision="bfloat16").record(images)["blocks.0"].values
    assert rounded.dtype == target(images).dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()
    assert target.weights_hash == digest
    with pytest.raises(BacksightError, match="float8"):
        target.to(precision="float8")


def test_taps_are_shown() -> None:
    table = vit().show_taps()
    assert table.columns.tolist() == ["tap", "kind", "shape", "grid", "prefix", "depth"]
    assert table.iloc[0].tolist() == ["patch_embed", "tokens", "B × 50 × 48", "7 × 7", 1, 0]
