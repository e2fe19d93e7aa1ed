"""Targets: taps are what they say, the model stays as it was, and what cannot be loaded is refused in one sentence."""

import pytest
import timm
import torch
from timm.models import vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from backsight.errors import BacksightError
from backsight.representation import Predictions, Queries
from backsight.studies.tuning import answer_of
from backsight.targets.base import Preprocessing, Stage, seeded
from backsight.targets.detectors import Detr
from backsight.targets.timm_models import TimmTarget

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
MEAN_STD = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (32, 32))


def _images(batch: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _usual(model: nn.Module) -> Preprocessing:
    return Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), model.patch_embed.img_size)


def _scatter(model: nn.Module) -> nn.Module:
    """Random biases, scales and tokens too, so that no step is an identity by its initial value."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


VITS = {
    "class token": {},
    "average pool": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
    "registers without class token": {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    "non-square": {"img_size": (48, 80)},
    "non-square patches": {"patch_size": (8, 16), "img_size": (32, 64)},
    "dynamic size": {"dynamic_img_size": True},
    "clip": {"pre_norm": True, "norm_layer": nn.LayerNorm, "act_layer": "quick_gelu"},
    "qkv without bias, query and key norm": {"qkv_bias": False, "qk_norm": True},
    "scaled norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "attention pool": {"class_token": False, "global_pool": "map"},
    "no head": {"num_classes": 0},
    "no pool": {"global_pool": ""},
    "no position": {"pos_embed": "none"},
    "norm after": {"block_fn": vision_transformer.ResPostBlock, "init_values": 0.5},
    "parallel attention": {"block_fn": vision_transformer.ParallelThingsBlock},
    "differential attention": {"attn_layer": "diff"},
    "gated MLP": {"mlp_layer": vision_transformer.SwiGLU},
    "drop rates": {"drop_path_rate": 0.5, "patch_drop_rate": 0.5, "pos_drop_rate": 0.5, "proj_drop_rate": 0.5},
}


def _vit(**changes) -> TimmTarget:
    with seeded(0):
        model = vision_transformer.VisionTransformer(**{**TINY, **changes})
    return TimmTarget(_scatter(model), "tiny", "random", _usual(model))


def _deit3() -> TimmTarget:
    with seeded(0):
        model = timm.create_model("deit3_small_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2)
    return TimmTarget(_scatter(model), "deit3", "random", _usual(model))


def _distilled() -> TimmTarget:
    with seeded(0):
        model = VisionTransformerDistilled(**TINY)
    return TimmTarget(_scatter(model), "distilled", "random", _usual(model))


def _detr_config(**changes) -> DetrConfig:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    settings = {
        "backbone_config": backbone,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 20,
        "num_queries": 5,
        "id2label": {0: "disc", 1: "ring", 2: "star"},
    }
    return DetrConfig(**{**settings, **changes})


def _detr(**changes) -> Detr:
    with seeded(0):
        model = DetrForObjectDetection(_detr_config(**changes))
    return Detr(_scatter(model), "tiny-detr", MEAN_STD, "random", ("disc", "ring", "star"))


DETRS = {"sine": {}, "learned positions": {"position_embedding_type": "learned"}, "auxiliary": {"auxiliary_loss": True}}


def _output_parts(output) -> tuple[torch.Tensor, ...]:
    return (output.logits, output.boxes) if isinstance(output, Predictions) else (output,)


def _assert_every_tap_continues(target, images, padding=None):
    """from_tap of every tap gives the output of the bare model, called without backsight's own forward."""
    normalised = target.preprocessing.normalise(images)
    with torch.no_grad():
        if target.kind == "detector":
            mask = None
            if padding is not None:
                normalised, mask = normalised.masked_fill(padding[:, None], 0), (~padding).long()
            raw = target.model(pixel_values=normalised, pixel_mask=mask)
            expected = (raw.logits, raw.pred_boxes)
        else:
            expected = (target.model(normalised),)
    recorded = target.record(images, target.available_taps, padding)
    assert tuple(recorded) == target.available_taps
    for tap, representation in recorded.items():
        for part, truth in zip(_output_parts(target.from_tap(tap, representation)), expected, strict=True):
            assert (part - truth).abs().max() <= 1e-5, tap
    for part, truth in zip(_output_parts(target(images, padding)), expected, strict=True):
        assert torch.equal(part, truth)


@pytest.mark.parametrize("changes", VITS.values(), ids=VITS)
def test_vit_continues_from_every_tap(changes):
    target = _vit(**changes)
    _assert_every_tap_continues(target, _images(2, *target.image_size))


@pytest.mark.parametrize("build", [_deit3, _distilled])
def test_deit_continues_from_every_tap(build):
    target = build()
    _assert_every_tap_continues(target, _images())


def test_dynamic_size_continues_on_another_grid():
    target = _vit(dynamic_img_size=True)
    _assert_every_tap_continues(target, _images(1, 24, 48))
    assert target.record(_images(1, 24, 48))["blocks.0"].grids == ((3, 6),)


@pytest.mark.parametrize("changes", DETRS.values(), ids=DETRS)
@pytest.mark.parametrize("batch", [1, 3])
def test_detr_continues_from_every_tap(changes, batch):
    target = _detr(**changes)
    images = _images(batch, 32, 48)
    _assert_every_tap_continues(target, images)
    padding = torch.zeros(batch, 32, 48, dtype=torch.bool)
    padding[0, :, 32:] = True
    padding[-1, 16:] = True
    _assert_every_tap_continues(target, images, padding)


def test_detr_with_a_timm_backbone_continues_from_every_tap():
    backbone = {
        "model_type": "timm_backbone",
        "backbone": "resnet18",
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": [1, 2],
    }
    target = _detr(backbone_config=backbone)
    assert target.reduction == (8, 8)
    _assert_every_tap_continues(target, _images(2, 32, 48))


def test_a_changed_representation_changes_the_output():
    """Each tap really carries the forward pass (from_tap does not read something recorded elsewhere)."""
    for target in (_vit(), _detr()):
        for tap, representation in target.record(_images(), target.available_taps).items():
            if tap == "predictions":
                continue
            changed = representation.replace(values=representation.values.flip(-1))
            outputs = [_output_parts(target.from_tap(tap, each))[0] for each in (representation, changed)]
            assert (outputs[0] - outputs[1]).abs().max() > 1e-4, tap


def test_vit_taps_agree_with_timm():
    target = _vit(reg_tokens=2)
    recorded = target.record(_images(), "fine")
    normalised = target.preprocessing.normalise(_images())
    with torch.no_grad():
        final, between = target.model.forward_intermediates(normalised, return_prefix_tokens=True, output_fmt="NLC")
    for index, (patches, prefix) in enumerate(between):
        torch.testing.assert_close(recorded[f"blocks.{index}"].patches, patches)
        torch.testing.assert_close(recorded[f"blocks.{index}"].prefix_values, prefix)
    torch.testing.assert_close(recorded["norm"].values, final)
    assert recorded["norm"].prefix == 3
    block, entering = target.model.blocks[0], recorded["patch_embed"].values
    after_attention = entering + block.ls1(block.attn(block.norm1(entering)))
    torch.testing.assert_close(recorded["blocks.0.attn"].values, after_attention)


def test_detr_taps_agree_with_transformers():
    target = _detr()
    recorded = target.record(_images(2, 32, 48), "fine")
    raw = target.model(target.preprocessing.normalise(_images(2, 32, 48)), output_hidden_states=True)
    torch.testing.assert_close(recorded["projection"].values, raw.encoder_hidden_states[0])
    torch.testing.assert_close(recorded["encoder.layers.0"].values, raw.encoder_hidden_states[1])
    torch.testing.assert_close(recorded["encoder.layers.1"].values, raw.encoder_last_hidden_state)
    torch.testing.assert_close(recorded["decoder.layers.0"].values, raw.decoder_hidden_states[1])
    torch.testing.assert_close(recorded["decoder.layernorm"].values, raw.last_hidden_state)
    assert not torch.allclose(recorded["decoder.layers.1"].values, raw.last_hidden_state, atol=1e-3)
    assert recorded["backbone"].channels == 16
    assert recorded["backbone"].grids == ((4, 6),)
    assert isinstance(recorded["decoder.layers.0"], Queries)
    assert isinstance(recorded["predictions"], Predictions)


def test_padding_and_positional_code_travel_with_the_tokens():
    target = _detr()
    plain = target.record(_images(2, 32, 48))
    assert plain["encoder.layers.0"].padding is None
    assert plain["encoder.layers.0"].position.shape == (1, 24, 16)
    padding = torch.zeros(2, 32, 48, dtype=torch.bool)
    padding[0, :, 32:] = True
    recorded = target.record(_images(2, 32, 48), padding=padding)
    tokens = recorded["encoder.layers.1"]
    assert tokens.padding[0].view(4, 6).tolist() == [[False] * 4 + [True] * 2] * 4
    assert not tokens.padding[1].any()
    assert tokens.position.shape == (2, 24, 16)
    torch.testing.assert_close(tokens.position[1:], plain["encoder.layers.0"].position)
    assert torch.equal(recorded["decoder.layers.0"].context.values, tokens.values)


def test_queries_without_context_are_refused():
    target = _detr()
    recorded = target.record(_images())
    with pytest.raises(BacksightError, match="context"):
        target.from_tap("decoder.layers.0", Queries(recorded["decoder.layers.0"].values))
    target.from_tap("decoder.layernorm", Queries(recorded["decoder.layernorm"].values))


@pytest.mark.parametrize("build", [_vit, _detr])
def test_record_leaves_no_trace(build, monkeypatch):
    target = build()
    model = target.model

    def state():
        hooks = {name: len(each._forward_hooks) + len(each._forward_pre_hooks) for name, each in model.named_modules()}
        modes = [module.training for module in model.modules()]
        frozen = [parameter.requires_grad for parameter in model.parameters()]
        return hooks, modes, frozen, type(target).weights_hash.func(target), torch.get_rng_state().tolist()

    before = state()
    target.record(_images(), target.available_taps)
    assert state() == before

    def broken(*_args, **_kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        target.record(_images(), target.available_taps)
    assert state() == before


def test_a_tap_that_never_runs_is_named(monkeypatch):
    target = _vit()
    monkeypatch.setattr(target.model, "forward", lambda images: images.mean(dim=(2, 3)))
    with pytest.raises(BacksightError, match=r"never ran.*blocks\.1"):
        target.record(_images(), ["blocks.1"])


def test_each_pass_records_only_what_was_asked_in_one_pass():
    target, passes = _detr(), []
    handle = target.model.register_forward_hook(lambda *_: passes.append(1))
    assert tuple(target.record(_images(), ["encoder.layers.0", "predictions"])) == ("encoder.layers.0", "predictions")
    handle.remove()
    assert passes == [1]


def test_a_pass_that_records_ends_with_the_last_of_its_taps():
    target, ran = _vit(), []
    whole = target.record(_images(), target.available_taps)
    handles = [
        block.register_forward_hook(lambda *_, n=number: ran.append(n))
        for number, block in enumerate(target.model.blocks)
    ]
    early = target.record(_images(), ["patch_embed", "blocks.0"])
    for handle in handles:
        handle.remove()
    assert ran == [0]
    assert all(torch.equal(early[tap].values, whole[tap].values) for tap in early)


def test_who_reads_the_output_beside_gets_it():
    target, answers = _vit(), []
    with target.model.register_forward_hook(lambda _model, _given, output: answers.append(output)):
        target.record(_images(), ["blocks.0"])
    assert len(answers) == 1
    _, answer = answer_of(target, _images(), ["blocks.0"])
    assert torch.equal(answer, answers[0])


def test_gradients_reach_the_images_only_when_asked():
    images = _images().requires_grad_()
    for target in (_vit(), _detr()):
        last = target.taps[-1]
        assert not target.record(images, [last])[last].values.requires_grad
        target.record(images, [last], gradient=True)[last].values.sum().backward()
        assert images.grad.abs().sum() > 0
        images.grad = None


def test_training_mode_is_refused():
    target = _vit()
    target.model.blocks[0].train()
    with pytest.raises(BacksightError, match=r"call target\.model\.eval"):
        target.record(_images())


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 3, 32, 40), r"its own size is \(32, 32\)"),
        (torch.zeros(2, 1, 32, 32), "shape"),
        (torch.zeros(3, 32, 32), "shape"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "divide them by 255"),
        (torch.full((2, 3, 32, 32), 2.0), r"in \[0, 1\]"),
    ],
)
def test_unfit_images_are_refused(images, said):
    with pytest.raises(BacksightError, match=said):
        _vit().record(images)


def test_sizes_allowed_are_said():
    with pytest.raises(BacksightError, match="divisible by patch size"):
        _vit(dynamic_img_size=True).check_size((33, 32))
    with pytest.raises(BacksightError, match="multiples of 8"):
        _detr().check_size((32, 36))
    with pytest.raises(BacksightError, match=r"\(400, 400\)"):
        _detr(position_embedding_type="learned").check_size((32, 408))


def test_padded_images_are_refused_by_a_vit():
    padding = torch.zeros(2, 32, 32, dtype=torch.bool)
    _vit().record(_images(), padding=padding)
    padding[0, 0] = True
    with pytest.raises(BacksightError, match="attention mask"):
        _vit().record(_images(), padding=padding)


def test_unknown_taps_bring_the_nearest():
    with pytest.raises(BacksightError, match=r"no tap 'block\.1'; nearest: .*blocks\.1"):
        _vit().record(_images(), ["block.1"])
    with pytest.raises(BacksightError, match=r"encoder\.layers\.1"):
        _detr().resolve_taps("encoder.layer.1")
    with pytest.raises(BacksightError, match="No tap"):
        _vit().resolve_taps([])
    with pytest.raises(BacksightError, match="no tap 'pixels'"):
        _vit().resolve_taps(["pixels"])


def test_parallel_blocks_have_no_half_steps():
    target = _vit(block_fn=vision_transformer.ParallelScalingBlock)
    _assert_every_tap_continues(target, _images())
    assert target.resolve_taps("fine") == target.resolve_taps("blocks")
    assert target.stage("blocks.1", "patch_embed") == Stage("blocks", 2, 2, 64)


def test_tap_sets():
    vit, detr = _vit(), _detr()
    assert vit.taps == ("patch_embed", "blocks.0", "blocks.1", "norm")
    assert vit.resolve_taps("components") == ("patch_embed", "blocks.1")
    assert vit.resolve_taps("fine")[1:3] == ("blocks.0.attn", "blocks.0")
    assert vit.select(["norm", "blocks.0"]).taps == ("blocks.0", "norm")
    assert vit.resolve_taps("norm, blocks.0") == ("blocks.0", "norm")
    assert "norm" not in _vit(global_pool="avg").available_taps
    assert detr.resolve_taps("components") == ("projection", "encoder.layers.1", "decoder.layernorm", "predictions")
    assert detr.taps == (
        "backbone",
        "projection",
        "encoder.layers.0",
        "encoder.layers.1",
        "decoder.layers.0",
        "decoder.layers.1",
        "decoder.layernorm",
        "predictions",
    )
    assert set(detr.available_taps) - set(detr.taps) == {
        "encoder.layers.0.attn",
        "encoder.layers.1.attn",
        "decoder.layers.0.attn",
        "decoder.layers.0.cross_attn",
        "decoder.layers.1.attn",
        "decoder.layers.1.cross_attn",
    }


@pytest.mark.parametrize(
    ("previous", "tap", "kind", "depth"),
    [
        ("pixels", "patch_embed", "patch_embedding", 0),
        ("patch_embed", "blocks.0", "blocks", 1),
        ("patch_embed", "blocks.0.attn", "blocks", 1),
        ("blocks.0.attn", "blocks.0", "blocks", 1),
        ("blocks.0.attn", "blocks.1.attn", "blocks", 1),
        ("patch_embed", "norm", "blocks", 2),
        ("blocks.1", "norm", "norm", 0),
    ],
)
def test_stages_of_a_vit(previous, tap, kind, depth):
    assert _vit(mlp_ratio=3).stage(tap, previous) == Stage(kind, depth, 2, 48)


@pytest.mark.parametrize(
    ("previous", "tap", "stage"),
    [
        ("pixels", "backbone", Stage("backbone", 0, 2, 24)),
        ("pixels", "projection", Stage("backbone", 0, 2, 24)),
        ("backbone", "projection", Stage("projection", 0, 2, 24)),
        ("projection", "encoder.layers.1", Stage("encoder", 2, 2, 24)),
        ("encoder.layers.0", "encoder.layers.1.attn", Stage("encoder", 1, 2, 24)),
        ("encoder.layers.1", "decoder.layernorm", Stage("decoder", 2, 4, 20)),
        ("encoder.layers.1", "decoder.layers.0", Stage("decoder", 1, 4, 20)),
        ("decoder.layers.0", "decoder.layers.1", Stage("decoder", 1, 4, 20)),
        ("decoder.layers.1", "decoder.layernorm", Stage("norm", 0, 4, 20)),
        ("decoder.layernorm", "predictions", Stage("heads", 0, 4, 16)),
        ("projection", "predictions", Stage("decoder", 4, 4, 20)),
    ],
)
def test_stages_of_a_detr(previous, tap, stage):
    assert _detr().stage(tap, previous) == stage


def test_stages_have_an_order():
    with pytest.raises(BacksightError, match="swap"):
        _vit().stage("blocks.0", "blocks.1")
    with pytest.raises(BacksightError, match="no tap"):
        _vit().stage("blocks.0", "pixel")


def test_depth_is_the_place_in_forward_order():
    vit, detr = _vit(), _detr()
    assert [vit.depth(tap) for tap in ("pixels", "patch_embed", "blocks.0", "blocks.1", "norm")] == [-1, 0, 1, 2, 3]
    assert vit.depth("blocks.1.attn") == 1.5
    assert detr.depth("projection") == 1
    assert detr.depth("decoder.layers.0.cross_attn") == pytest.approx(3 + 2 / 3)
    depths = [detr.depth(tap) for tap in detr.available_taps]
    assert depths == sorted(depths)


def test_untrained_is_the_same_architecture_with_other_weights():
    for target in (_vit(reg_tokens=2, init_values=0.1), _distilled(), _detr()):
        before = torch.get_rng_state()
        one, same, other = target.untrained(0), target.untrained(0), target.untrained(1)
        assert torch.equal(torch.get_rng_state(), before)
        assert one.weights == "random"
        assert one.weights_hash == same.weights_hash
        assert len({one.weights_hash, other.weights_hash, target.weights_hash}) == 3
        assert target.weights_hash == type(target).weights_hash.func(target)
        kept = dict(target.model.named_parameters())
        assert not any(torch.equal(value, kept[name]) for name, value in one.model.named_parameters())
        one.record(_images())


def test_weights_hash_follows_the_weights():
    one, other = _vit(), _vit()
    assert one.weights_hash == other.weights_hash
    assert len(one.weights_hash) == 16
    third = _vit()
    with torch.no_grad():
        third.model.blocks[0].norm1.bias[0] += 1e-3
    assert third.weights_hash != one.weights_hash
