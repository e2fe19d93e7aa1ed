"""Own checkpoints: every wrapper that people's training scripts put around weights, and refusals that name the keys."""

import argparse
import collections
import pathlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.targets import Target, load_target
from backsight.targets.base import seeded
from backsight.targets.checkpoints import choose, read_tensors

TINY: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
State = dict[str, Tensor]


def vit(**changes: Any) -> nn.Module:
    with seeded(0):
        return timm.create_model("test_vit", **{**TINY, **changes})


STATE: State = vit().state_dict()


def load(path: Path, **changes: Any) -> Target:
    return load_target(f"test_vit@{path}", **{**TINY, **changes})


def under(prefix: str, state: State = STATE) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def written(path: Path, content: Any) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def assert_same(target: Target, state: State = STATE) -> None:
    own = target.model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], value) for name, value in state.items())


PREFIXES = [
    *("", "module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "vit.", "timm_model."),
    *("_orig_mod.module.", "module._orig_mod.", "model._orig_mod.module.", "module.module.", "model.model."),
    *("base_model.model.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "teacher.backbone."),
]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(tmp_path: Path, prefix: str, suffix: str) -> None:
    tensors = read_tensors(written(tmp_path / f"mine{suffix}", under(prefix)))
    choice = choose(tensors, STATE)
    assert choice.state.keys() == STATE.keys()
    assert not choice.note
    assert all(torch.equal(value, STATE[name]) for name, value in choice.state.items())


def test_modules_that_wrap_others_anywhere(tmp_path: Path) -> None:
    state = {f"_fsdp_wrapped_module.{name}".replace("blocks.0.", "blocks.0._orig_mod."): STATE[name] for name in STATE}
    state = {
        name.replace(".attn.", "._checkpoint_wrapped_module._orig_mod.attn."): value for name, value in state.items()
    }
    assert choose(read_tensors(written(tmp_path / "mine.pth", state)), STATE).state.keys() == STATE.keys()


WRAPPERS: dict[str, Callable[[State], Any]] = {
    **{
        key: lambda state, key=key: {key: state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
        for key in ("state_dict", "model", "model_state_dict", "net", "network", "weights", "params", "module")
    },
    "ema.module": lambda state: {"ema": {"module": state}},
    "nested": lambda state: {"model": {"state_dict": under("module.", state)}},
    "teacher": lambda state: {"teacher": under("backbone.", state), "args": argparse.Namespace(rate=0.1)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(tmp_path: Path, wrapper: str) -> None:
    choice = choose(read_tensors(written(tmp_path / "mine.pth", WRAPPERS[wrapper](STATE))), STATE)
    assert choice.state.keys() == STATE.keys()
    assert not choice.unused


@pytest.mark.parametrize(
    "build",
    [
        lambda state, mean: {"model": state, "ema": {"module": mean}},
        lambda state, mean: {"model_ema": mean, "model": state},
        lambda state, mean: {"state_dict": state, "state_dict_ema": under("module.", mean)},
        lambda state, mean: {"state_dict": {**under("model.", state), **under("ema_model.", mean)}},
        lambda state, mean: {"student": under("backbone.", state), "teacher": under("backbone.", mean)},
    ],
)
def test_averaged_weights_win_and_are_named(tmp_path: Path, build: Callable[[State, State], Any]) -> None:
    mean = {name: value + 1 for name, value in STATE.items()}
    path = written(tmp_path / "mine.ckpt", build(STATE, mean))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the plain weights are no left-over
        target = load(path)
    assert_same(target, mean)
    assert target.weights.startswith(f"test_vit@{path}")
    assert "EMA" in target.weights


@pytest.mark.parametrize(
    "name", ["mine.pth", "mine.pt", "mine.bin", "mine.ckpt", "model_best.pth.tar", "mine.safetensors"]
)
def test_suffixes(tmp_path: Path, name: str) -> None:
    target = load(written(tmp_path / name, STATE))
    assert_same(target)
    assert target.weights == f"test_vit@{tmp_path / name}"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"total_ops": torch.zeros(1)}, "total_ops"),
        ({"decoder_pos_embed": torch.zeros(1, 5, 8)}, "decoder_pos_embed"),
        ({"head2.weight": torch.zeros(4, 24)}, "head2.weight"),
        ({"norm.num_batches_tracked": torch.tensor(3)}, "norm.num_batches_tracked"),
    ],
)
def test_what_lies_beside_the_model_is_named_once(tmp_path: Path, extra: State, named: str) -> None:
    with pytest.warns(UserWarning, match=named) as caught:
        assert_same(load(written(tmp_path / "mine.safetensors", {**STATE, **extra})))
    assert len([warning for warning in caught if named in str(warning.message)]) == 1


def test_lightning_files_with_criteria_and_metrics(tmp_path: Path) -> None:
    state = {**under("model."), "criterion.pos_weight": torch.ones(2), "val_acc.correct": torch.tensor(3)}
    path = written(tmp_path / "last.ckpt", {"pytorch-lightning_version": "2.1", "state_dict": state, "loops": {}})
    with pytest.warns(UserWarning, match=r"criterion\.pos_weight"):
        assert_same(load(path))


def test_a_file_without_head_is_a_target_without_head(tmp_path: Path) -> None:
    state = vit(num_classes=0).state_dict()
    target = load(written(tmp_path / "mine.pth", state))
    assert target.model.num_classes == 0
    assert_same(target, state)


def test_the_encoder_of_a_masked_autoencoder(tmp_path: Path) -> None:
    state = vit(num_classes=0).state_dict()
    content = {**state, "mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24)}
    with pytest.warns(UserWarning, match="decoder_embed"):
        assert_same(load(written(tmp_path / "mae.pth", {"model": content})), state)


def test_number_of_classes_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    state = vit(num_classes=7, img_size=64).state_dict()
    path = written(tmp_path / "mine.safetensors", state)
    arguments = {name: value for name, value in TINY.items() if name != "img_size"}
    target = load_target(f"test_vit@{path}", **arguments)
    assert target.image_size == (64, 64)
    assert_same(target, state)
    smaller = load_target(f"test_vit@{path}", image_size=(32, 48), **arguments)
    assert smaller.image_size == (32, 48)
    assert smaller.model.pos_embed.shape[1] == 1 + 2 * 3
    assert torch.equal(smaller.model.pos_embed[:, 0], state["pos_embed"][:, 0])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("xcit_nano_12_p16_224", {"embed_dim": 16, "depth": 1, "num_heads": 2}),  # pos_embed is a module
        (
            "samvit_base_patch16",
            {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 3, "neck_chans": 8},
        ),  # a map
    ],
)
def test_position_embeddings_of_other_forms(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    state = timm.create_model(name, num_classes=3, **arguments).state_dict()
    path = written(tmp_path / "mine.safetensors", state)
    assert_same(load_target(f"{name}@{path}", **arguments), state)


def test_position_embeddings_with_a_class_token_before_registers(tmp_path: Path) -> None:
    """As DINOv2's authors publish them; timm keeps none for class and register tokens."""
    arguments = {"depth": 1, "embed_dim": 24, "num_heads": 3}
    own = timm.create_model("vit_small_patch14_reg4_dinov2", **arguments).state_dict()
    state = {name.replace("reg_token", "register_tokens"): value for name, value in own.items()}
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), own["pos_embed"]], 1)
    state["mask_token"] = torch.zeros(1, 24)
    path = written(tmp_path / "dinov2_vits14_reg4_pretrain.pth", state)
    target = load_target(f"vit_small_patch14_reg4_dinov2@{path}", **arguments)
    assert torch.equal(target.model.pos_embed, own["pos_embed"])
    assert torch.equal(target.model.reg_token, own["reg_token"])
    small = load_target(f"vit_small_patch14_reg4_dinov2@{path}", image_size=56, **arguments)
    assert small.model.pos_embed.shape[1] == 16


def test_files_of_jax(tmp_path: Path) -> None:
    np.savez(tmp_path / "Ti_16.npz", cls=np.zeros(3))
    with pytest.raises(BacksightError, match=r"Ti_16\.npz"):
        load(tmp_path / "Ti_16.npz")
    tensors = {
        "cls": np.full((1, 1, 24), 2.0),
        "embedding/kernel": np.ones((16, 16, 3, 24)),
        "embedding/bias": np.ones(24),
    }
    tensors["Transformer/posembed_input/pos_embedding"] = np.full((1, 5, 24), 3.0)
    for name, shape in {"scale": 24, "bias": 24}.items():
        tensors[f"Transformer/encoder_norm/{name}"] = np.ones(shape)
    block = "Transformer/encoderblock_0"
    for part in ("query", "key", "value"):
        tensors[f"{block}/MultiHeadDotProductAttention_1/{part}/kernel"] = np.ones((24, 3, 8))
        tensors[f"{block}/MultiHeadDotProductAttention_1/{part}/bias"] = np.ones((3, 8))
    tensors[f"{block}/MultiHeadDotProductAttention_1/out/kernel"] = np.ones((3, 8, 24))
    tensors[f"{block}/MultiHeadDotProductAttention_1/out/bias"] = np.ones(24)
    for layer, (rows, columns) in {"Dense_0": (24, 96), "Dense_1": (96, 24)}.items():
        tensors[f"{block}/MlpBlock_3/{layer}/kernel"] = np.ones((rows, columns))
        tensors[f"{block}/MlpBlock_3/{layer}/bias"] = np.ones(columns)
    for norm in ("LayerNorm_0", "LayerNorm_2"):
        tensors[f"{block}/{norm}/scale"] = tensors[f"{block}/{norm}/bias"] = np.ones(24)
    np.savez(tmp_path / "whole.npz", **{name: value.astype(np.float32) for name, value in tensors.items()})
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3}
    target = load_target(f"vit_tiny_patch16_224@{tmp_path / 'whole.npz'}", **arguments)
    assert float(target.model.cls_token[0, 0, 0]) == 2.0
    assert target.model.num_classes == 0


# Refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {k: v for k, v in s.items() if "norm1" not in k}, r"4 missing \(blocks\.0\.norm1\.bias, "),
        (
            lambda s: {**s, "norm.weight": torch.ones(9)},
            r"1 of another shape \(norm\.weight \(9,\) instead of \(24,\)\)",
        ),
        (
            lambda s: {**s, **{k.replace("blocks.1", "blocks.2"): v + 0 for k, v in s.items() if "blocks.1" in k}},
            r"unexpected \(blocks\.2\.attn",
        ),
        (
            lambda s: {k.replace("norm.", "final."): v for k, v in s.items()},
            r"2 unexpected \(final\.bias, final\.weight\)",
        ),
        (lambda s: {k: (v * 100).to(torch.int8) for k, v in s.items()}, r"of whole numbers \(.*torch\.int8"),
        (lambda _: {"transformer.x": torch.zeros(3), "class_embed": torch.zeros(92, 4)}, "class_embed, transformer:"),
    ],
)
def test_misfits_are_named(tmp_path: Path, change: Callable[[State], State], said: str) -> None:
    with pytest.raises(BacksightError, match=said) as caught:
        load(written(tmp_path / "mine.safetensors", change(STATE)))
    assert "\n" not in str(caught.value)


def test_a_file_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(BacksightError, match="epoch, history"):
        load(written(tmp_path / "mine.pth", {"epoch": 3, "history": {"loss": 0.1}}))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(0.9), "numpy"),
        (pathlib.PurePosixPath("/a"), "PurePosixPath"),
        (collections.defaultdict(list), "defaultdict"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_refused_classes_are_named(tmp_path: Path, value: Any, named: str, legacy: bool) -> None:
    path = tmp_path / "mine.pth"
    torch.save({"state_dict": STATE, "best": value}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BacksightError, match=named) as caught:
        load(path)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    ran: list[str] = []

    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (ran.append, ("ran",))

    with pytest.raises(BacksightError, match="no safe weights"):
        load(written(tmp_path / "mine.pth", {"state_dict": Harmful()}))
    assert not ran


@pytest.mark.parametrize("content", [b"", b"nothing", b"\xff" * 64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_damaged_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"mine{suffix}").write_bytes(content)
    with pytest.raises(BacksightError, match=rf"mine\{suffix}.* is corrupt"):
        load(tmp_path / f"mine{suffix}")
