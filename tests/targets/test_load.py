"""A name becomes a target: shipped, timm, transformers, folders; and what cannot be loaded is refused in a sentence."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from backsight.errors import BacksightError
from backsight.targets import SHIPPED, Target, list_targets, load, load_target, names, weights_folder
from backsight.targets.base import seeded

TINY: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
DETR: dict[str, Any] = {
    "backbone_config": transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    ),
    **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    "num_queries": 5,
    "id2label": {0: "disc", 1: "ring", 2: "star"},
}
PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 32, "width": 48}}


def refused(name: str, said: str, **arguments: Any) -> str:
    with pytest.raises(BacksightError, match=said) as caught:
        load_target(name, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(target: Target, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *target.image_size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data/weights of its own, with one classifier and one detector in the shipped formats."""
    folder = tmp_path / "weights"
    monkeypatch.setattr(names, "weights_folder", lambda: folder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    vit, detr = folder / "scenes-vit", folder / "scenes-detr"
    vit.mkdir(parents=True)
    arguments = {**TINY, "patch_size": 8, "num_classes": 5}
    with seeded(0):
        save_file(timm.models.VisionTransformer(**arguments).state_dict(), vit / "model.safetensors")
        transformers.DetrForObjectDetection(transformers.DetrConfig(**DETR)).save_pretrained(detr)
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "label_names": list("abcde")}
    data = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "interpolation": "bilinear"}
    (vit / "config.json").write_text(json.dumps({**config, "pretrained_cfg": data}))
    (detr / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    for name in (vit, detr):
        (name / "card.json").write_text("{}")
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file; None takes a key away."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if changes.get(key, 0) is not None}))


# Shipped


def test_shipped_classifier_and_detector(placed: Path) -> None:
    vit, detr = load_target("scenes-vit", taps="fine"), load_target("scenes-detr")
    assert (vit.weights, vit.kind, vit.classes) == ("shipped", "classifier", tuple("abcde"))
    assert (vit.preprocessing.mean, vit.image_size, vit.preprocessing.interpolation) == (
        (0.1, 0.2, 0.3),
        (32, 32),
        "bilinear",
    )
    assert (detr.weights, detr.kind, detr.classes) == ("shipped", "detector", ("disc", "ring", "star"))
    assert detr.image_size == (32, 48)
    assert detr.preprocessing.std == pytest.approx((0.4, 0.5, 0.6))
    for target in (vit, detr):
        by_file = load_target(str(placed / target.name / "model.safetensors"))
        assert by_file.weights_hash == target.weights_hash
        assert not any(module.training for module in target.model.modules())
        assert not any(parameter.requires_grad for parameter in target.model.parameters())


@pytest.mark.parametrize("name", ["scenes-vit", "scenes-detr"])
def test_random_weights_are_seeded_and_recorded(placed: Path, name: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (load_target(name, pretrained=False, seed=seed) for seed in (3, 3, 4))
    load_target(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.weights == "random"
    assert one.weights_hash == same.weights_hash != other.weights_hash


@pytest.mark.parametrize("name", ["scenes-vit", "scenes-detr"])
def test_damaged_weights(placed: Path, name: str) -> None:
    path = placed / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(name, rf"model\.safetensors in {name} is corrupt")
    path.unlink()
    refused(name, "has no model")
    config = placed / name / "config.json"
    config.write_text("{broken")
    refused(name, "JSON")
    assert "missing" in {row["name"]: row["status"] for row in list_targets()}[name]


@pytest.mark.parametrize(
    ("name", "change", "dropped"),
    [("scenes-vit", "embed_dim", "norm.bias"), ("scenes-detr", "encoder_ffn_dim", "bbox_predictor.layers.0.bias")],
)
def test_weights_of_another_architecture(placed: Path, name: str, change: str, dropped: str) -> None:
    path, config = placed / name / "model.safetensors", placed / name / "config.json"
    state, values = load_file(path), json.loads(config.read_text())
    save_file({key: value for key, value in state.items() if key != dropped}, path)
    refused(name, dropped.replace(".", r"\."))
    save_file({key: (value * 100).to(torch.int8) for key, value in state.items()}, path)
    refused(name, "int8")
    save_file(state, path)
    edit(config, **({"model_args": {**values["model_args"], change: 48}} if "model_args" in values else {change: 32}))
    refused(name, "does not fit")


def test_descriptions_of_nothing(placed: Path, tmp_path: Path) -> None:
    (placed / "scenes-vit" / "config.json").write_text('{"hidden": 3}')
    refused("scenes-vit", "model_type")
    (placed / "scenes-detr" / "config.json").write_text('{"model_type": "bert"}')
    refused("scenes-detr", "'bert'")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "no config")
    save_file({"weight": torch.zeros(2)}, tmp_path / "bare.safetensors")
    refused(str(tmp_path / "bare.safetensors"), "NAME@path")
    (placed / "scenes-vit").rename(placed / "elsewhere")
    refused("scenes-vit", "18_targets")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_targets_themselves(name: str) -> None:
    target = load_target(name)
    card = json.loads((weights_folder() / name / "card.json").read_text())
    assert (target.weights, target.image_size) == ("shipped", (64, 64))
    assert len(target.classes or ()) == 12
    assert card["taps"] == list(target.available_taps)


# Names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scenes-vitt", "nearest: scenes-vit"),
        ("vit_base_patch16_225", "nearest: .*vit_base_patch16_224"),
        ("nosuchmodel", "nearest|there are: scenes"),
        ("vit_base_patch16_224.nonsense", "augreg"),
        ("./nowhere", "no target"),
        ("nowhere.safetensors", "no target"),
        ("vit_tiny_patch16_224@nowhere.pth.tar", "no target"),
        ("", "needs a name"),
    ],
)
def test_unknown_names(name: str, said: str) -> None:
    assert "_resolve" not in refused(name, said)


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "facebook/detr-resnet-50", "hf_hub:timm/vit_tiny_patch16_224", "nobody/nothing"]
)
def test_without_network_the_error_says_what_to_do(placed: Path, name: str) -> None:
    said = refused(name, "hf download")
    assert f"data/weights/{name.removeprefix('hf_hub:')}" in said
    assert "pretrained=False" not in said


def test_random_weights_of_a_hub_name_need_its_configuration() -> None:
    assert "pretrained=False" not in refused("google/vit-base-patch16-224", "hf download", pretrained=False)


def test_the_list_of_targets(placed: Path) -> None:
    rows = {row["name"]: row for row in list_targets()}
    assert all(row.keys() == {"name", "kind", "status", "needs"} for row in rows.values())
    assert rows["scenes-vit"] == {"name": "scenes-vit", "kind": "classifier", "status": "ready", "needs": ""}
    assert rows["scenes-detr"]["kind"] == "detector"
    assert rows["scenes-swin"]["status"] == "missing"
    assert rows["vit_base_patch16_224"]["status"] == rows["facebook/detr-resnet-50"]["status"] == "to fetch"
    assert {name for name in load.USUAL if "/" not in name} <= set(timm.list_models())
    (placed / "vit_base_patch16_224").mkdir()
    (placed / "vit_base_patch16_224" / "model.safetensors").touch()
    assert {row["name"]: row for row in list_targets()}["vit_base_patch16_224"]["status"] == "ready"


# timm


def test_weights_brought_by_hand(placed: Path) -> None:
    (placed / "test_vit").mkdir()
    state = timm.create_model("test_vit").state_dict()
    save_file(state, placed / "test_vit" / "model.safetensors")
    target = load_target("test_vit")
    assert target.weights == "pretrained"
    assert len(target.classes or ()) == 1000
    assert torch.equal(target.model.head.weight, state["head.weight"])


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "mine.pth"])
def test_timm_folders(tmp_path: Path, prefix: str, file: str) -> None:
    with seeded(0):
        model = timm.create_model("test_vit", num_classes=7, **TINY)
    timm.models.save_for_hf(model, tmp_path, model_config={"model_args": TINY}, safe_serialization=True)
    if file != "model.safetensors":
        torch.save(model.state_dict(), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    target = load_target(f"{prefix}{tmp_path}")
    assert target.model.num_classes == 7
    assert (target.preprocessing.mean, target.preprocessing.crop_fraction) == ((0.5, 0.5, 0.5), 0.95)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in target.model.state_dict().items())


def test_model_arguments_and_layers_by_name(tmp_path: Path) -> None:
    target = load_target("test_vit", pretrained=False, mlp_layer="SwiGLUPacked", **TINY)
    assert type(target.model.blocks[0].mlp).__name__ in ("GluMlp", "SwiGLUPacked")
    assert target.image_size == (32, 32)
    config = {"architecture": "test_vit", "model_args": {**TINY, "mlp_layer": "SwiGLUPackd"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(str(tmp_path), "SwiGLUPacked", pretrained=False)
    refused("test_vit", "no_such", pretrained=False, no_such=3)


def test_image_sizes_of_timm_models() -> None:
    arguments = {name: value for name, value in TINY.items() if name != "img_size"}
    target = load_target("test_vit", pretrained=False, image_size=(32, 64), **arguments)
    assert target.record(images(target))["blocks.1"].grids == ((2, 4),)  # type: ignore[union-attr]
    for size in (0, (32,)):
        refused("test_vit", "image size", pretrained=False, image_size=size)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_need_their_own_mean_and_std(tmp_path: Path, channels: int) -> None:
    arguments = {**TINY, "in_chans": channels}
    save_file(timm.create_model("test_vit", **arguments).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "model_args": arguments}))
    refused(str(tmp_path), f"{channels} channels")
    edit(tmp_path / "config.json", pretrained_cfg={"mean": [0.5] * channels, "std": [0.2] * channels})
    target = load_target(str(tmp_path))
    assert target.record(torch.rand(1, channels, 32, 32))["norm"].batch == 1


def test_the_folder_of_a_timm_wrapper(tmp_path: Path) -> None:
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=3)
    model = transformers.TimmWrapperForImageClassification(config)
    model.save_pretrained(tmp_path)
    for name in (str(tmp_path), f"test_vit@{tmp_path / 'model.safetensors'}"):
        target = load_target(name)
        assert target.kind == "classifier"
        assert torch.equal(target.model.head.weight, model.timm_model.head.weight)


def test_device_and_dtype() -> None:
    target = load_target("test_vit", pretrained=False, device="cpu", **TINY)
    assert target.device == torch.device("cpu")
    assert load_target("test_vit", pretrained=False, device="meta", **TINY).device == torch.device("meta")
    for device in ("nothing", "xla:7"):
        refused("test_vit", device, pretrained=False, device=device, **TINY)
    half = load_target("test_vit", pretrained=False, dtype="bfloat16", **TINY)
    plain = load_target("test_vit", pretrained=False, **TINY)
    assert half.record(images(half))["norm"].values.dtype == torch.float32  # type: ignore[union-attr]
    assert half.weights_hash == plain.weights_hash
    assert not torch.equal(half(images(half)), plain(images(half)))  # type: ignore[arg-type]


# transformers


def _clip(vision: dict[str, Any]) -> nn.Module:
    text = {**SMALL, "vocab_size": 99}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))


def _siglip(vision: dict[str, Any]) -> nn.Module:
    text = {**SMALL, "vocab_size": 99}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))


VISION = {**SMALL, "image_size": 32, "patch_size": 8}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3)),
    "ViT alone": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
    "DeiT": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**VISION)),
    "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)),
    "DINOv3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION)),
    "BEiT": lambda: transformers.BeitModel(transformers.BeitConfig(**VISION)),
    "CLIP": lambda: _clip(VISION),
    "CLIP vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
    "SigLIP": lambda: _siglip(VISION),
    "Swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
        )
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_and_classifiers(tmp_path: Path, name: str) -> None:
    with seeded(9):
        model = ENCODERS[name]().eval()
    model.save_pretrained(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        target = load_target(str(tmp_path))
    assert target.taps
    assert target.weights == str(tmp_path)
    assert target.preprocessing.std == pytest.approx((0.4, 0.5, 0.6))
    vision = getattr(model, "vision_model", model)
    values = target.preprocessing.normalise(images(target))
    with torch.no_grad():
        output = vision(pixel_values=values)
    expected = output.logits if "logits" in output else output.last_hidden_state
    torch.testing.assert_close(target(images(target)), expected)
    recorded = target.record(images(target))
    for tap in target.taps:
        torch.testing.assert_close(target.from_tap(tap, recorded[tap]), expected)
    one, other = target.untrained(0), target.untrained(1)
    assert (one.select("blocks").taps, one.classes) == (target.taps, target.classes)
    assert len({one.weights_hash, other.weights_hash, target.weights_hash}) == 3
    random = load_target(str(tmp_path), pretrained=False, seed=0)
    assert (random.weights, random.weights_hash) == ("random", one.weights_hash)


def test_an_encoder_at_another_size(tmp_path: Path) -> None:
    with seeded(0):
        transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    target = load_target(str(tmp_path), image_size=(32, 64))
    assert target.image_size == (32, 64)
    assert target.record(images(target))[target.taps[-1]].grids == ((4, 8),)  # type: ignore[union-attr]


def test_an_encoder_without_processor_has_its_own_size(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**{**VISION, "image_size": [32, 64]})
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="preprocessor_config"):
        target = load_target(str(tmp_path))
    assert target.image_size == (32, 64)
    with torch.no_grad():
        torch.testing.assert_close(target(images(target)), model(target.preprocessing.normalise(images(target))).logits)
    with pytest.warns(UserWarning, match="preprocessor_config"):
        assert load_target(str(tmp_path), pretrained=False, num_hidden_layers=1).model.config.num_hidden_layers == 1
    refused(str(tmp_path), "hidden_size", hidden_sise=12)


def test_checkpoints_of_transformers_models(tmp_path: Path) -> None:
    """In parts, in the older format, wrapped by a training script, and with a folder's configuration."""
    with seeded(0):
        model = transformers.ViTModel(transformers.ViTConfig(**VISION))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    model.save_pretrained(tmp_path, max_shard_size="9KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    digest = load_target(str(tmp_path)).weights_hash
    part = min(tmp_path.glob("*.safetensors"))
    part.rename(tmp_path / "elsewhere")
    refused(str(tmp_path), part.name)
    for path in tmp_path.glob("model*"):
        path.unlink()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "mine.ckpt")
    assert load_target(str(tmp_path)).weights_hash == digest
    assert load_target(f"{tmp_path}@{tmp_path / 'mine.ckpt'}").weights_hash == digest


def test_names_of_the_hub_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transformers, and a repository of timm's that is named as transformers names them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("encoder", "timm"):
        place = tmp_path / f"models--somebody--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        folder = place / "snapshots" / ("0" * 40)
        if name == "encoder":
            with seeded(9):
                transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
        else:
            model = timm.create_model("test_vit", num_classes=7, **TINY)
            timm.models.save_for_hf(model, folder, model_config={"model_args": TINY}, safe_serialization=True)
    for name in ("somebody/encoder", "somebody/timm", "hf-hub:somebody/timm"):
        target = load_target(name)
        assert (target.name, target.weights, target.image_size) == (name, "pretrained", (32, 32))
    assert torch.equal(target.model.head.weight, model.head.weight)
    assert (
        load_target("somebody/encoder").weights_hash != load_target("somebody/encoder", pretrained=False).weights_hash
    )


def test_original_detr_files_are_told_from_transformers(placed: Path, tmp_path: Path) -> None:
    content = {"model": {"transformer.x": torch.zeros(3), "class_embed.weight": torch.zeros(92, 256)}}
    torch.save(content, tmp_path / "detr-r50.pth")
    refused(f"{placed / 'scenes-detr'}@{tmp_path / 'detr-r50.pth'}", "does not fit.*the file holds model")


# Preprocessing


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (480, 640)),
        ({"size": 800, "max_size": 1333}, (480, 640)),
        ({"size": {"shortest_edge": 96, "longest_edge": 96}}, (96, 96)),
        ({"size": {"shortest_edge": 60, "longest_edge": 128}}, (64, 80)),
        ({"size": {"max_height": 96, "max_width": 128}}, (96, 128)),
        ({"size": {"longest_edge": 64}}, (64, 64)),
        ({"size": [64, 96]}, (64, 96)),
    ],
)
def test_sizes_of_a_detector(placed: Path, processor: dict[str, Any], size: tuple[int, int]) -> None:
    (placed / "scenes-detr" / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    assert load_target("scenes-detr").image_size == size
    assert load_target("scenes-detr", image_size=(32, 48)).image_size == (32, 48)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"rescale_factor": 1 / 127.5}, 0.5 * 0.1, 0.5 * 0.4),
        ({"do_rescale": False}, 0.1 / 255, 0.4 / 255),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"image_mean": 0.1, "image_std": 0.4}, 0.1, 0.4),
    ],
)
def test_scales_are_used(placed: Path, processor: dict[str, Any], mean: float, std: float) -> None:
    """A transformers processor and the target give the model the same values."""
    path = placed / "scenes-detr" / "preprocessor_config.json"
    path.write_text(json.dumps({**PROCESSOR, **processor}))
    preprocessing = load_target("scenes-detr").preprocessing
    assert (preprocessing.mean[0], preprocessing.std[0]) == pytest.approx((mean, std))
    picture = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    values = transformers.AutoImageProcessor.from_pretrained(path.parent)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocessing.normalise(picture[None] / 255.0), values.float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "processor",
    [{"size": {"height": 64}}, {"size": {"height": -1, "width": 5}}, {"image_std": [0, 1, 1]}, {"image_mean": [0.1]}],
)
def test_damaged_processors(placed: Path, processor: dict[str, Any]) -> None:
    (placed / "scenes-detr" / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    refused("scenes-detr", "preprocess")


def test_without_a_processor_that_is_said(placed: Path) -> None:
    (placed / "scenes-detr" / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="preprocessor_config"):
        assert load_target("scenes-detr").preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))


def test_crop_and_interpolation_of_an_encoder(tmp_path: Path) -> None:
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).save_pretrained(tmp_path)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    preprocessing = load_target(str(tmp_path)).preprocessing
    assert (preprocessing.size, preprocessing.crop_fraction, preprocessing.interpolation) == ((32, 32), 0.8, "bicubic")
