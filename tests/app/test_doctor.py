"""doctor: shipped targets that are damaged are named."""

import shutil
from pathlib import Path

import pytest

from backsight.app import doctor
from backsight.targets import SHIPPED, names


def test_damaged_shipped_targets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "weights"
    shutil.copytree(names.weights_folder(), folder, ignore=shutil.ignore_patterns("inverses"))
    monkeypatch.setattr(names, "weights_folder", lambda: folder)
    vit, deit, swin, detr, deformable = (folder / name for name in SHIPPED)
    (vit / "model.safetensors").write_bytes((vit / "model.safetensors").read_bytes()[:1000])
    (detr / "config.json").write_text("{broken")
    (swin / "model.safetensors").unlink()
    verdicts = {subject: verdict for verdict, subject, _ in doctor.shipped()}
    assert [verdicts[name.name] for name in (vit, swin, detr)] == ["FAIL"] * 3
    assert [verdicts[name.name] for name in (deit, deformable)] == ["OK"] * 2


def test_the_kernel_starts_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor._kernel() == "python3 starts"
    assert capfd.readouterr().err == ""
