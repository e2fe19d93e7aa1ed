"""README's program runs as it stands, and with the other targets and images that its comments name."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import backsight

Names = dict[str, Any]


def program(root: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return code


def run(code: str, *changes: tuple[str, str]) -> Names:
    """Execute the program, after changes that each have to find their place in it."""
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    names: Names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def read_better_than_grey(printed: str) -> None:
    psnr = [float(line.split()[1]) for line in printed.splitlines()]
    assert psnr
    assert psnr[0] > 15
    assert all(np.isfinite(psnr))


FEW = (", 2000)", ", 100)")


def test_as_it_stands(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(program(root), FEW)
    assert list(names["inverses"]) == list(names["target"].taps)
    read_better_than_grey(capsys.readouterr().out)


def photographs(folder: Path, count: int = 24) -> Path:
    """Smooth coloured pictures of several sizes, portrait and landscape."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        small = draw.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        size = (96, 72) if number % 2 else (70, 91)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=95)
    return folder


def transformers_folder(kind: str, folder: Path) -> Path:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    torch.manual_seed(0)
    if kind == "ViTForImageClassification":
        config = transformers.ViTConfig(**sizes, intermediate_size=64, num_labels=5)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    else:
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "Dinov2Model"])
def test_with_a_folder_of_transformers_and_a_folder_of_photographs(
    kind: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pictures = transformers_folder(kind, tmp_path / kind), photographs(tmp_path / "pictures")
    names = run(program(root), ('"scenes-vit"', repr(str(model))), ('"scenes"', repr(str(pictures))), FEW)
    assert tuple(names["image"].shape) == (1, 3, 56, 56)
    read_better_than_grey(capsys.readouterr().out)


def test_with_random_weights_of_a_timm_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """README names vit_base_patch16_224; the smallest of its kind stands for it here."""
    small = '"vit_tiny_patch16_224", pretrained=False, image_size=64, taps=["patch_embed", "blocks.0"]'
    run(program(root), ('"scenes-vit"', small), FEW)
    read_better_than_grey(capsys.readouterr().out)


def test_all_five_families_give_an_image() -> None:
    target = backsight.load_target("scenes-vit", taps=["patch_embed", "blocks.0"])
    train = backsight.open_images("scenes", "train", target, 32)
    validation = backsight.open_images("scenes", "validation", target, 8)
    recorded = target.record(backsight.picture("chelsea", target.image_size))
    for family in ("linear", "direct", "modular", "exact", "map"):
        inverses = backsight.fit(family, target, train, validation, steps=2, progress=False)
        image = inverses["blocks.0"](recorded["blocks.0"])
        assert tuple(image.shape) == (1, 3, 64, 64), family
        assert image.min() >= 0, family
        assert image.max() <= 1, family
