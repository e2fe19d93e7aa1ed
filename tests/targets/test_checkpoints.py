"""Own checkpoints: every format that people have, other numbers of classes, and refusals that name the keys."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import YolosConfig, YolosForObjectDetection

from backsight.errors import BacksightError
from backsight.targets import check_target, load_target, sources
from backsight.targets.base import seeded
from backsight.targets.sources import misfit, read_checkpoint, read_shapes

VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
YOLOS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": [32, 32],
    "patch_size": 8,
    "num_detection_tokens": 4,
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "answers", lambda _: False)
    monkeypatch.setattr(sources, "weights_folder", lambda: tmp_path / "weights")


def _vit(**changes: object) -> nn.Module:
    with seeded(0):
        return timm.create_model("test_vit", **{**VIT, **changes})


def _timm_folder(folder: Path, state: dict[str, Tensor], name: str = "model.safetensors") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    description = {"architecture": "test_vit", "num_classes": 3, "model_args": {**VIT, "num_classes": 3}}
    (folder / "config.json").write_text(json.dumps(description))
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return str(folder)


def _yolos(**changes: object) -> YolosForObjectDetection:
    classes = {0: "disc", 1: "ring", 2: "star"}
    with seeded(0):
        return YolosForObjectDetection(YolosConfig(**{**YOLOS, "id2label": classes, **changes}))


def _refusal(name: str) -> str:
    """What check_target and load_target say, both of them, in one sentence."""
    said = []
    for use in (check_target, load_target):
        with pytest.raises(BacksightError) as caught:
            use(name)
        said.append(str(caught.value))
        assert "\n" not in said[-1]
    return said[0]


def _assert_loaded(name: str, state: dict[str, Tensor]) -> None:
    check_target(name)
    target = load_target(name)
    assert target.weights == name
    loaded = target.model.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(loaded[key], value), key


WRAPPED = {
    "bare": lambda state: state,
    "training script": lambda state: {"model": state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "data parallel": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled in parallel": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 1},
    "averaged": lambda state: {"model": {name: value + 1 for name, value in state.items()}, "model_ema": state},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_files_of_training_scripts(tmp_path: Path, wrapper: str) -> None:
    path, state = tmp_path / "mine.pth", _vit().state_dict()
    torch.save(WRAPPED[wrapper](state), path)
    assert read_checkpoint(path).keys() == state.keys() == read_shapes(path).keys()
    assert all(torch.equal(value, state[name]) for name, value in read_checkpoint(path).items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_checkpoints_named_with_their_architecture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    model = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}}, path)
    _assert_loaded(f"test_vit@{path}", model.state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth"])
def test_timm_folders(tmp_path: Path, name: str) -> None:
    state = _vit().state_dict()
    _assert_loaded(_timm_folder(tmp_path / "mine", state, name), state)


def test_transformers_folders_whole_and_in_parts(tmp_path: Path) -> None:
    model = _yolos()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    assert len(list(index.parent.glob("*.safetensors"))) > 2
    for name in (tmp_path / "whole", tmp_path / "parts", index):
        _assert_loaded(str(name), model.state_dict())
    target = load_target(str(tmp_path / "parts"))
    assert target.classes == ("disc", "ring", "star")
    assert target.weights_hash == load_target(str(tmp_path / "whole")).weights_hash


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    _yolos().save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    part = sorted((tmp_path / "parts").glob("*.safetensors"))[1]
    part.unlink()
    said = _refusal(str(tmp_path / "parts"))
    assert "lacks 1 of its" in said
    assert part.name in said
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text("{}")
    assert "names no files" in _refusal(str(tmp_path / "parts"))
    index.write_text("{")
    assert "JSON" in _refusal(str(tmp_path / "parts"))


def test_another_number_of_classes(tmp_path: Path) -> None:
    """In the configuration, or only in the weights."""
    model = _yolos(id2label={0: "one", 1: "two"})
    model.save_pretrained(tmp_path / "said")
    assert load_target(str(tmp_path / "said")).classes == ("one", "two")
    model.save_pretrained(tmp_path / "unsaid")
    config = tmp_path / "unsaid" / "config.json"
    values = json.loads(config.read_text())
    for key in ("id2label", "label2id", "num_labels"):
        values.pop(key, None)
    config.write_text(json.dumps(values))
    _assert_loaded(str(tmp_path / "unsaid"), model.state_dict())
    named = timm.create_model("test_vit", num_classes=7)
    save_file(named.state_dict(), tmp_path / "named.safetensors")
    _assert_loaded(f"test_vit@{tmp_path / 'named.safetensors'}", named.state_dict())
    vit = _vit(num_classes=7)
    _assert_loaded(_timm_folder(tmp_path / "timm", vit.state_dict()), vit.state_dict())


def test_a_wrong_number_of_classes_is_a_misfit(tmp_path: Path) -> None:
    _yolos().save_pretrained(tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    values = json.loads(config.read_text())
    values["id2label"] = {str(number): f"class {number}" for number in range(5)}
    values.pop("label2id", None)
    config.write_text(json.dumps(values))
    said = _refusal(str(tmp_path / "mine"))
    assert "2 of another shape (class_labels_classifier.layers.2.bias (4,) instead of (6,), " in said
    assert "class_labels_classifier.layers.2.weight (4, 16) instead of (6, 16)" in said


def test_which_keys_differ_in_a_timm_checkpoint(tmp_path: Path) -> None:
    state = _vit().state_dict()
    folder = tmp_path / "mine"
    lacking = {name: value for name, value in state.items() if not name.startswith("blocks.1.norm")}
    assert "4 missing (blocks.1.norm1.bias, blocks.1.norm1.weight, blocks.1.norm2.bias, …)" in _refusal(
        _timm_folder(folder, lacking)
    )
    again = {name.replace("blocks.1", "blocks.2"): value + 0 for name, value in state.items() if "blocks.1" in name}
    deeper = {**state, **again}
    assert re.search(r"\d+ unexpected \(blocks\.2\.attn\.proj\.bias, ", _refusal(_timm_folder(folder, deeper)))
    wider = {**state, "norm.weight": torch.ones(9), "norm.bias": torch.ones(9)}
    assert "2 of another shape (norm.bias (9,) instead of (24,), norm.weight (9,) instead of (24,))" in _refusal(
        _timm_folder(folder, wider)
    )
    renamed = {name.replace("norm.", "final."): value for name, value in state.items() if "blocks" not in name}
    renamed |= {name: value for name, value in state.items() if "blocks" in name}
    said = _refusal(_timm_folder(folder, renamed))
    assert "2 missing (norm.bias, norm.weight), 2 unexpected (final.bias, final.weight)" in said


def test_which_keys_differ_in_a_transformers_checkpoint(tmp_path: Path) -> None:
    model = _yolos()
    model.save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / "model.safetensors"
    state = model.state_dict()
    save_file({name: value for name, value in state.items() if "layernorm_after" not in name}, file)
    for said in _refusals(str(tmp_path / "mine")):
        assert "vit.encoder.layer.0.layernorm_after.bias" in said
    save_file({**state, "bbox_predictor.layers.0.bias": torch.ones(3)}, file)
    for said in _refusals(str(tmp_path / "mine")):
        assert "bbox_predictor.layers.0.bias (3,) instead of (16,)" in said


def _refusals(name: str) -> list[str]:
    said = []
    for use in (check_target, load_target):
        with pytest.raises(BacksightError, match=r"model\.safetensors does not fit") as caught:
            use(name)
        said.append(str(caught.value))
    return said


def test_misfit_in_words() -> None:
    wanted = {"layers.0.a": (2, 2), "layers.1.a": (2, 2), "head": (3, 2)}
    assert misfit(wanted, wanted) == ""
    assert misfit({**wanted, "counter": (), "layers.0.buffer": (4,)}, wanted) == ""
    assert misfit({**wanted, "layers.2.a": (2, 2)}, wanted) == "1 unexpected (layers.2.a)"
    other_names = {"first": (2, 2), "second": (2, 2), "head": (3, 2)}
    assert misfit(other_names, wanted, renamed=True) == ""
    assert misfit(other_names, wanted) == "2 missing (layers.0.a, layers.1.a), 2 unexpected (first, second)"
    del other_names["second"]
    assert misfit(other_names, wanted, renamed=True).startswith("2 missing (layers.0.a, layers.1.a)")
    many = {**wanted, **{f"layers.{number}.a": (1,) for number in range(5)}}
    assert misfit(wanted, many).count("…") == 0
    assert "5 missing (layers.0.a, layers.1.a, layers.2.a, …)" in misfit({"head": (3, 2)}, many)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    ran: list[str] = []

    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (ran.append, ("ran",))

    _yolos().save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").unlink()
    torch.save({"state_dict": Harmful()}, tmp_path / "mine" / "pytorch_model.bin")
    for use in (check_target, load_target):
        with pytest.raises(BacksightError, match="no safe weights"):
            use(str(tmp_path / "mine"))
    assert not ran
