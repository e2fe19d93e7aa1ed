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
    (deit / "card.json").write_text("{}")
    (swin / "model.safetensors").unlink()
    verdicts = {finding.subject: finding.verdict for finding in doctor._data(tmp_path)}
    assert [verdicts[name.name] for name in (vit, deit, swin, detr)] == ["FAIL"] * 4
    assert verdicts[deformable.name] == "OK"
