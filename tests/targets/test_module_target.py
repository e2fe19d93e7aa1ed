"""Any nn.Module as a target: what its modules return is read rightly or refused, and the model stays as it was."""

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.inverses.linear import fit_linear
from backsight.representation import Tokens
from backsight.targets import PIXELS, module_target, suggest_taps
from backsight.targets.base import Preprocessing, Stage, seeded
from backsight.training.fit import fit_direct, fit_modular

CHANNELS = 6


def _images(batch: int = 2, height: int = 16, width: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


class Attending(nn.Module):
    """A pre-norm layer on (N, B, C) or (B, N, C)."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


@dataclass
class Features:
    note: str
    hidden: Tensor
    pooled: Tensor


class Body(nn.Module):
    """Two layers of attention whose output comes in some wrapping."""

    def __init__(self, wrap: Callable[[Tensor], object], layout: str = "bnc", prefix: int = 0) -> None:
        super().__init__()
        self.wrap, self.layout = wrap, layout
        self.layers = nn.ModuleList(Attending(layout != "nbc") for _ in range(2))
        self.prefix = nn.Parameter(torch.randn(1, prefix, CHANNELS))

    def forward(self, maps: Tensor) -> object:
        x = maps.flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        x = x.transpose(0, 1) if self.layout == "nbc" else x
        for layer in self.layers:
            x = layer(x)
        return self.wrap(x)


class Hybrid(nn.Module):
    """A convolution, a body, and a head that reads what `unwrap` finds."""

    def __init__(
        self,
        wrap: Callable[[Tensor], object] = lambda x: x,
        unwrap: Callable[[object], Tensor] = lambda x: x,
        layout: str = "bnc",
        prefix: int = 0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 4, 4)
        self.body = Body(wrap, layout, prefix)
        self.head = nn.Linear(CHANNELS, 4)
        self.unwrap, self.axis = unwrap, 0 if layout == "nbc" else 1

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.unwrap(self.body(self.stem(images))).mean(self.axis))


class Named(OrderedDict[str, Tensor]):
    """A dictionary of its own class, such as the ModelOutput of transformers."""


WRAPPINGS = {
    "tuple": (lambda x: (x.mean(1), x * 2), lambda out: out[1], (1,)),
    "list": (lambda x: [x, x.mean(1)], lambda out: out[0], (0,)),
    "dictionary": (lambda x: {"ids": torch.arange(3), "hidden": x}, lambda out: out["hidden"], ("hidden",)),
    "own dictionary": (lambda x: Named(hidden=x, extra=x.mean(1)), lambda out: out["hidden"], ("hidden",)),
    "data class": (lambda x: Features("", x + 0, x.mean(1)), lambda out: out.hidden, ("hidden",)),
    "nested": (lambda x: ({"a": [x.mean(1), x]},), lambda out: out[0]["a"][1], (0, "a", 1)),
}


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    with seeded(0):
        return make()


def _agrees(target, images: Tensor) -> None:
    """Every tap records tokens of the target's images, and the rest of the pass from there is the model's own."""
    recorded, output = target.record(images), target(images)
    for tap in target.taps:
        assert recorded[tap].batch == len(images)
        assert (target.from_tap(tap, recorded[tap]) - output).abs().max() <= 1e-5


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_finds_the_representation_in_what_a_module_returns(wrapping: str) -> None:
    wrap, unwrap, element = WRAPPINGS[wrapping]
    target = module_target(_made(lambda: Hybrid(wrap, unwrap)), ["stem", "body"], image_size=(16, 24))
    assert target.describe()["element"].tolist() == ["all", "".join(f"[{key}]" for key in element)]
    assert target.describe()["grid"].tolist() == ["4 × 6", "4 × 6"]
    for batch in (1, 3):
        _agrees(target, _images(batch))


def test_an_element_can_be_given() -> None:
    model = _made(lambda: Hybrid(*WRAPPINGS["tuple"][:2]))
    target = module_target(model, ["body[0]", "body[1]"], image_size=(16, 24))
    recorded = target.record(_images())
    assert target.taps == ("body[0]", "body[1]")
    assert recorded["body[0]"].grids == ((1, 1),)
    assert "body[0]" in repr(target)
    assert target.describe()["cut"].tolist() == ["with its companions", "yes"]
    _agrees(target, _images())
    quoted = module_target(_made(lambda: Hybrid(*WRAPPINGS["dictionary"][:2])), ["body['hidden']"], image_size=(16, 24))
    _agrees(quoted, _images())
    with pytest.raises(BacksightError, match=r"tensors: body\[0\], body, body\[1\]"):
        module_target(model, ["body[2]"], image_size=(16, 24))


@pytest.mark.parametrize("layout", ["bnc", "nbc"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("size", [(16, 24), (16, 16), (18, 29)])
def test_reads_sequences_with_prefix_tokens_and_odd_sizes(layout: str, prefix: int, size: tuple[int, int]) -> None:
    model = _made(lambda: Hybrid(layout=layout, prefix=prefix))
    target = module_target(model, ["body.layers.0", "body.layers.1"], image_size=size)
    grid = (size[0] // 4, size[1] // 4)
    for batch in (1, 2):
        images = _images(batch, *size)
        tokens = target.record(images)["body.layers.0"]
        assert (tokens.grids, tokens.prefix, tokens.channels) == ((grid,), prefix, CHANNELS)
        _agrees(target, images)
    tokens = module_target(model, ["stem"], image_size=size).record(_images(2, *size))["stem"]
    wanted = model.stem(_images(2, *size)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.values, wanted.detach())


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, CHANNELS, 4, 4), nn.Linear(CHANNELS, 5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.mix(self.stem(images).permute(0, 2, 3, 1))
        return {"features": x, "logits": self.head(x.mean((1, 2)))}


def test_reads_channels_last_maps_and_finds_the_logits() -> None:
    model = _made(ChannelsLast)
    target = module_target(model, ["stem", "mix"], image_size=(16, 24))
    assert target.describe()["axes"].tolist() == ["bchw", "bhwc"]
    assert target(_images()).shape == (2, 3)
    _agrees(target, _images())
    features = module_target(model, ["mix"], image_size=(16, 24), output="features")
    assert features(_images()).shape == (2, 4, 6, 5)
    with pytest.raises(BacksightError, match=r"no floating-point tensor 'boxes'; there are: \[features\], \[logits\]"):
        module_target(model, ["mix"], image_size=(16, 24), output="boxes")


def test_axes_and_grids_can_be_given() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.flat, self.head = nn.Conv2d(3, 24, 4, 4), nn.Flatten(2), nn.Linear(24, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.flat(self.stem(images)).mean(2))

    model = _made(Flat)
    # 24 channels of 24 places: a change of the picture tells them apart, and the user can.
    with pytest.warns(UserWarning, match="unusual"):
        found = module_target(model, ["flat"], image_size=(16, 24))
    right = module_target(model, ["flat"], image_size=(16, 24), axes={"flat": "bcn"})
    assert [each.describe()["axes"][0] for each in (found, right)] == ["bcn", "bcn"]
    stem = module_target(model, ["stem"], image_size=(16, 24)).record(_images())["stem"]
    torch.testing.assert_close(right.record(_images())["flat"].values, stem.values)
    _agrees(right, _images())
    turned = module_target(model, ["flat"], image_size=(16, 24), axes={"flat": "bcn"}, grids={"flat": (6, 4)})
    assert turned.record(_images())["flat"].grids == ((6, 4),)
    prefixed = module_target(model, ["flat"], image_size=(16, 24), grids={"flat": (4, 5)})
    assert prefixed.record(_images())["flat"].prefix == 4
    for given in ({"grids": {"flat": (9, 9)}}, {"axes": {"flat": "bchw"}}, {"axes": {"flat": "nbc"}}):
        with pytest.raises(BacksightError, match="do not fit: correct them"):
            module_target(model, ["flat"], image_size=(16, 24), **given)
    with pytest.raises(BacksightError, match="axes are bchw"):
        module_target(model, ["flat"], image_size=(16, 24), axes={"flat": "ncb"})
    with pytest.raises(BacksightError, match="said of stem, which are not among the taps"):
        module_target(model, ["flat"], image_size=(16, 24), axes={"stem": "bchw"})


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for _ in range(3):
            x = self.block(x).tanh()
        return self.head(x.mean((2, 3)))


def test_a_module_that_is_called_several_times() -> None:
    model = _made(Recurrent)
    with pytest.raises(BacksightError, match=r"runs 3 times in a forward pass .*tensors: block@0, .*block@2"):
        module_target(model, ["block"], image_size=(16, 24))
    with pytest.raises(BacksightError, match=r"tensors: block@0, .*block@2"):
        module_target(model, ["block@3"], image_size=(16, 24))
    target = module_target(model, ["block@2", "stem", "block@0"], image_size=(16, 24))
    assert target.taps == ("stem", "block@0", "block@2")
    recorded = target.record(_images())
    x = model.stem(_images())
    torch.testing.assert_close(recorded["block@0"].maps()[0], model.block(x).detach())
    _agrees(target, _images())
    assert [tap for tap in target.available_taps if tap[-2:] in ("@0", "@1", "@2")] == ["block@0", "block@1", "block@2"]
    twice = nn.Sequential(shared := nn.Conv2d(3, 3, 1), shared)
    with pytest.raises(BacksightError, match="runs 2 times"):
        module_target(twice, ["1"], image_size=(8, 8))


class Skipping(nn.Module):
    """One connection goes around `deep`, and `pair` returns both of its ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.head = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)
        self.pair = nn.Module()
        self.pair = Pair()

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        deep, skip = self.pair(self.deep(x) + x)
        return self.head((deep.mean(0) + skip.mean((2, 3))).tanh())


class Pair(nn.Module):
    """Sequence-first tokens, and beside them what a decoder would read."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(2).permute(2, 0, 1) * 2, x.sin()


def test_what_goes_around_a_tap_is_refused_or_travels_with_it() -> None:
    target = module_target(_made(Skipping), ["stem", "deep", "pair"], image_size=(16, 24))
    assert target.describe()["cut"].tolist() == ["yes", "no", "with its companions"]
    images = _images(3)
    recorded = target.record(images)
    with pytest.raises(BacksightError, match="goes around"):
        target.from_tap("deep", recorded["deep"])
    pair = recorded["pair"]
    assert pair.context["[1]"].shape == (3, 1, 6, 4, 6)
    torch.testing.assert_close(target.from_tap("pair", pair), target(images))
    torch.testing.assert_close(target.from_tap("pair", pair.index([2])), target(images[2:]))
    with pytest.raises(BacksightError, match=r"behind pair .* also reads \[1\]"):
        target.from_tap("pair", Tokens(pair.values, pair.grids))
    deep = fit_linear(target, _images(40), taps=["deep", "pair"])  # all else works from any tap
    assert deep["deep"](recorded["deep"]).shape == images.shape


def test_a_path_that_autograd_does_not_see_is_found_by_trying() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.deep, self.head = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.stem(images)
            return self.head((self.deep(x) + images.detach().mean()).mean((2, 3)))

    target = module_target(_made(Detached), ["stem", "deep"], image_size=(16, 24))
    recorded = target.record(_images())
    for tap in target.taps:
        with pytest.raises(BacksightError, match="goes around"):
            target.from_tap(tap, recorded[tap])


def test_refuses_taps_that_hold_no_representation() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.nothing, self.numbers = Returns(lambda x: None), Returns(lambda x: {"ids": x.argmax(1)})
            self.constant = Returns(lambda x: torch.linspace(0, 1, 8 * 8 * 3).reshape(1, 3, 8, 8))
            self.windows = Returns(lambda x: x.unfold(2, 4, 4).reshape(-1, 12, 8))
            self.deep = Returns(lambda x: x[:, None, :, None])
            self.odd = Returns(lambda x: x.flatten(1)[:, :6].reshape(-1, 3, 2))
            self.attention = Returns(lambda x: x.flatten(1)[:, :150].reshape(-1, 6, 5, 5).repeat(1, 1, 5, 5))

        def forward(self, images: Tensor) -> Tensor:
            for each in (self.nothing, self.numbers, self.constant, self.windows, self.deep, self.odd, self.attention):
                each(images)
            return self.one(images) + images + 0 * self.constant(images)

    class Returns(nn.Module):
        def __init__(self, what: Callable[[Tensor], object]) -> None:
            super().__init__()
            self.what = what

        def forward(self, x: Tensor) -> object:
            return self.what(x)

    model = _made(Odd)
    reasons = {
        "unused": "unused runs 0 times in a forward pass",
        "ones": "no tap 'ones'; nearest: one",
        "nothing": "tensors: none",
        "numbers": "tensors: none",
        "constant@0": "the same for every image",
        "windows": "none of its axes holds the images alone",
        "deep": "no grid",
        "odd": r"no grid of the image of \(8, 8\)",
        "attention": "no grid",
        "blocks": "through which all must pass",
    }
    for tap, reason in reasons.items():
        with pytest.raises(BacksightError, match=reason):
            module_target(model, tap, image_size=(8, 8))
    with pytest.raises(BacksightError, match="No tap of Odd is named"):
        module_target(model, [], image_size=(8, 8))
    with pytest.raises(BacksightError, match="through which all must pass"):
        module_target(model, image_size=(8, 8))
    assert not suggest_taps(model, (8, 8))["recommended"].any()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_refuses_models_in_which_hooks_see_nothing() -> None:
    model = _made(Recurrent).eval()
    scripted = torch.jit.script(model)
    with pytest.raises(BacksightError, match="TorchScript"):
        module_target(scripted, ["stem"], image_size=(16, 24))
    with pytest.raises(BacksightError, match="TorchScript"):
        suggest_taps(nn.Sequential(scripted), (16, 24))
    exported = torch.export.export(model, (_images(1),))
    with pytest.raises(BacksightError, match="not of a ExportedProgram"):
        module_target(exported, ["stem"], image_size=(16, 24))
    with pytest.raises(BacksightError, match="exported graph"):
        module_target(exported.module(), ["stem"], image_size=(16, 24))


def test_unwraps_compiled_and_parallel_models() -> None:
    model = _made(Recurrent)
    plain = module_target(model, ["stem", "block@1"], image_size=(16, 24))
    inside = nn.Sequential(OrderedDict(first=torch.compile(model.stem, backend="eager"), last=nn.Conv2d(6, 6, 1)))
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        target = module_target(wrapped, ["stem", "block@1"], image_size=(16, 24))
        assert target.model is model
        torch.testing.assert_close(target(_images()), plain(_images()))
        _agrees(target, _images())
        assert suggest_taps(wrapped, (16, 24)).equals(suggest_taps(model, (16, 24)))
    _agrees(module_target(inside, ["first", "last"], image_size=(16, 24)), _images())


class Stateful(nn.Module):
    """Everything that a pass could change: statistics, a counter, dropout, random draws, the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6)
        self.active, self.drop, self.head = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 2)
        self.register_buffer("passes", torch.zeros(()))
        self.fails = False

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        images *= 2
        x = self.drop(self.active(self.norm(self.stem(images))))
        x = x + 0.1 * torch.randn_like(x) + random.random() + np.random.rand()  # noqa: NPY002
        if self.fails:
            raise ValueError("out of cheese")
        return self.head(x.mean((2, 3)))


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Fails where the model, or a random state, is not exactly as it was."""

    def state() -> tuple[object, ...]:
        modules = dict(model.named_modules())
        return (
            {name: each.training for name, each in modules.items()},
            {name: (len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in modules.items()},
            {name: (each.requires_grad, id(each), each.grad) for name, each in model.named_parameters()},
            {name: each.tolist() for name, each in model.state_dict().items()},
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),  # noqa: NPY002
            torch.backends.mha.get_fastpath_enabled(),
        )

    before = state()
    yield
    assert state() == before


def test_the_model_stays_exactly_as_it_was() -> None:
    model = _made(Stateful).train()
    model.drop.eval()
    model.stem.requires_grad_(False)
    images = _images()
    kept = images.clone()
    with _untouched(model):
        suggest_taps(model, images)
        target = module_target(model, ["stem", "norm", "active"], image_size=(16, 24))
        recorded = target.record(images)
        assert recorded["norm"].values.min() < 0  # the in-place ReLU after it has not written into the record
        _agrees(target, images)
        target.record(images, gradient=True)
        again = target.record(images)
        assert all(torch.equal(recorded[tap].values, again[tap].values) for tap in target.taps)
        fit_linear(target, _images(20))
        target.untrained(1)
    assert torch.equal(images, kept)
    model.fails = True
    with _untouched(model):
        for attempt in (
            lambda: suggest_taps(model, images),
            lambda: module_target(model, ["stem"], image_size=(16, 24)),
            lambda: target.record(images),
            lambda: target.from_tap("stem", recorded["stem"]),
        ):
            with pytest.raises((BacksightError, ValueError), match="out of cheese"):
                attempt()


def test_a_failing_pass_names_the_module() -> None:
    with pytest.raises(BacksightError, match=r"in head fails on images of \(16, 24\).*RuntimeError"):
        module_target(nn.Sequential(OrderedDict(head=nn.Linear(7, 2))), ["head"], image_size=(16, 24))


def test_a_module_that_takes_gradients_is_refused_with_the_reason() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Conv2d(3, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            loss = self.step(images.detach()).square().sum()
            return images - torch.autograd.grad(loss, list(self.step.parameters()))[0].mean()

    model = _made(Inner)
    with _untouched(model), pytest.raises(BacksightError, match="takes gradients by itself"):
        module_target(model, ["step"], image_size=(16, 24))


def test_suggests_taps_in_the_order_of_execution() -> None:
    model = _made(lambda: Hybrid(*WRAPPINGS["tuple"][:2], layout="bnc", prefix=1))
    table = suggest_taps(model, _images(5))
    assert table["tap"].tolist() == [
        *("stem", "body.layers.0.norm@in", "body.layers.0.norm", "body.layers.0.attention", "body.layers.0"),
        *("body.layers.1.norm", "body.layers.1.attention", "body.layers.1", "body[0]", "body", "head"),
    ]
    by = table.set_index("tap")
    assert by.loc["body.layers.0", ["form", "grid", "prefix", "shape"]].tolist() == ["tokens", "4 × 6", 1, "B × 25 × 6"]
    assert by.loc["stem", ["form", "axes", "shape"]].tolist() == ["map", "bchw", "B × 6 × 4 × 6"]
    assert by.loc["head", "form"] == "vector"
    assert by.query("cut").index.tolist() == [
        *("stem", "body.layers.0.norm@in", "body.layers.0", "body.layers.1", "body", "head")
    ]
    assert by["cost"].is_monotonic_increasing
    assert by["cost"].iloc[-1] == 1
    assert by.query("recommended").index.tolist() == ["stem", "body.layers.0", "body.layers.1", "body"]
    target = module_target(model, image_size=(16, 24))
    assert target.taps == ("stem", "body.layers.0", "body.layers.1", "body")
    _agrees(target, _images())


def test_equal_tensors_have_one_recommended_name() -> None:
    table = suggest_taps(timm.create_model("resnet18", num_classes=3), (32, 48)).set_index("tap")
    assert table.query("recommended").index.tolist() == [
        *("maxpool", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"),
        *("layer4.0", "layer4.1"),
    ]
    assert table.loc[["layer1", "layer1.1.act2"], "same_as"].tolist() == ["layer1.1", "layer1.1"]


def test_blocks_are_recommended_and_not_their_steps() -> None:
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32)
    with torch.no_grad():
        vit.heads.head.weight.normal_()  # zeros would say nothing of the image
    target = module_target(vit, image_size=(32, 32))
    blocks = [f"encoder.layers.encoder_layer_{number}" for number in (0, 1)]
    assert target.taps == ("encoder.dropout", *blocks, "encoder")
    stages = [target.stage(tap, before) for before, tap in zip((PIXELS, *target.taps), target.taps, strict=False)]
    assert [stage.kind for stage in stages] == ["patch_embedding", "blocks", "blocks", "norm"]
    assert [stage.depth for stage in stages] == [0, 1, 1, 0]
    _agrees(target, _images(2, 32, 32))


def test_suggest_taps_takes_any_images() -> None:
    model = _made(Recurrent)
    tables = [
        suggest_taps(model, given) for given in (_images(1, 64, 64), (64, 64), open_images("scenes", "test", 64, 4))
    ]
    assert all(each.equals(tables[0]) for each in tables)
    grey = Preprocessing((0.5,), (0.5,), (64, 64))
    assert suggest_taps(nn.Conv2d(1, 4, 4, 4), (64, 64), grey).empty  # the model itself is no tap
    assert suggest_taps(nn.Sequential(nn.Conv2d(1, 4, 4, 4)), (64, 64), grey)["tap"].tolist() == ["0"]


def test_suggest_taps_refuses_unfit_images() -> None:
    for images in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8)):
        with pytest.raises(BacksightError, match="needs float images"):
            suggest_taps(_made(Recurrent), images)


def test_stages_say_what_lies_between() -> None:
    model = _made(lambda: Hybrid(prefix=1))
    target = module_target(model, ["stem", "body.layers.0", "body.layers.1.norm", "body"], image_size=(16, 24))
    kinds = [target.stage(tap, before).kind for before, tap in zip((PIXELS, *target.taps), target.taps, strict=False)]
    assert kinds == ["patch_embedding", "blocks", "norm", "blocks"]
    assert target.stage("body", "stem") == Stage("blocks", 2, 2, 0)
    with pytest.raises(BacksightError, match="swap them"):
        target.stage("stem", "body")


def test_odd_sizes_are_inverted_end_to_end() -> None:
    target = module_target(_made(lambda: Hybrid(layout="nbc", prefix=1)), image_size=(18, 29))
    images = _images(12, 18, 29)
    quick = {"steps": 2, "batch_size": 4, "ridge_images": 12, "progress": False}
    direct, modular = fit_direct(target, images, **quick), fit_modular(target, images, **quick)
    recorded = target.record(images[:2])
    for tap in target.taps:
        assert direct[tap](recorded[tap]).shape == (2, 3, 18, 29)
        assert modular[tap](recorded[tap]).shape == (2, 3, 18, 29)


def test_reads_models_of_transformers_and_timm() -> None:
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    target = module_target(_made(lambda: ViTModel(config)), image_size=(32, 32))
    tokens = target.record(_images(2, 32, 32))[target.taps[-1]]
    assert (tokens.prefix, tokens.grids) == (1, ((4, 4),))
    _agrees(target, _images(2, 32, 32))
    swin = {"img_size": 32, "window_size": 4, "patch_size": 2, "depths": (1, 1), "embed_dim": 16, "num_heads": (1, 1)}
    target = module_target(timm.create_model("swin_tiny_patch4_window7_224", **swin), image_size=(32, 32))
    assert set(target.describe()["axes"]) == {"bhwc"}
    _agrees(target, _images(2, 32, 32))


def test_half_precision_is_kept_inside() -> None:
    target = module_target(_made(Recurrent).double(), ["stem", "block@2"], image_size=(16, 24))
    assert target.record(_images())["stem"].values.dtype == torch.float32
    _agrees(target, _images())


# Untrained models, weights, sizes


class _Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.normed = nn.BatchNorm2d(6)
        self.active = nn.ReLU(inplace=True)

    def forward(self, images):
        return self.head(self.active(self.normed(self.stem(images))).mean((2, 3)))


def test_module_target_records_and_continues() -> None:
    module = _made(_Bottleneck)
    target = module_target(module, ["head", "stem", "normed"], image_size=(16, 24))
    assert target.taps == ("stem", "normed", "head")
    recorded = target.record(_images())
    assert recorded["stem"].grids == ((4, 6),)
    _agrees(target, _images())
    assert target.reduction == (4, 4)
    assert target.depth("normed") == 1
    assert target.untrained(1).weights_hash != target.untrained(2).weights_hash
    with pytest.raises(BacksightError, match="declared for images of"):
        target.record(_images(2, 8, 8))
    with pytest.raises(BacksightError, match="padd"):
        target.record(_images(), padding=torch.ones(2, 16, 24, dtype=torch.bool))


def test_the_hash_follows_the_weights() -> None:
    module = _made(_Bottleneck)
    target = module_target(module, ["stem"], image_size=(16, 24), name="mine")
    before, same = target.weights_hash, copy.deepcopy(module)
    assert target.weights_hash == before == target.with_model(same).weights_hash
    with torch.no_grad():
        module.stem.weight += 1
    assert target.weights_hash != before
    assert target.with_model(same).name == "mine"


def test_an_untrained_model_that_cannot_be_drawn_is_given() -> None:
    target = module_target(_made(lambda: Hybrid(prefix=1)), ["body.layers.0"], image_size=(16, 24))
    with pytest.raises(BacksightError, match=r"body.prefix of Hybrid cannot be drawn anew.*with_model"):
        target.untrained()
    attending = module_target(
        _made(lambda: nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Flatten(2), Turned())), "2.layer", image_size=(16, 24)
    )
    assert attending.untrained(1).weights_hash != attending.weights_hash


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Attending(batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2))


def test_module_target_reads_token_sequences() -> None:
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", **tiny)
    preprocess = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (32, 32))
    images = _images(2, 32, 32)
    for grids in ({}, {"blocks.0": (4, 4)}):
        target = module_target(vit, ["blocks.0"], preprocess, grids=grids)
        tokens = target.record(images)["blocks.0"]
        assert isinstance(tokens, Tokens)
        assert tokens.prefix == 1
        torch.testing.assert_close(target(images), vit.eval()(preprocess.normalise(images)))
        _agrees(target, images)
