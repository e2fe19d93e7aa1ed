"""What the name of a target stands for: a shipped folder, a folder or checkpoint, a name of timm or of the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backsight.errors import BacksightError, nearest
from backsight.project import project_root
from backsight.targets.base import Preprocessing
from backsight.targets.checkpoints import SUFFIXES, checkpoint_in, read_object

SHIPPED = ("scenes-vit", "scenes-deit", "scenes-swin", "scenes-detr", "scenes-deformable-detr")
# Listed by `backsight targets`; any other name of timm or transformers works too.
# fmt: off
USUAL = (
    "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch16_clip_224",
    "vit_small_patch14_dinov2", "vit_base_patch14_reg4_dinov2", "deit_small_patch16_224", "deit3_base_patch16_224",
    "beit_base_patch16_224", "eva02_small_patch14_224", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224",
    "hiera_tiny_224", "convnext_tiny", "resnet50", "facebook/dinov2-small", "google/vit-base-patch16-224",
    "facebook/detr-resnet-50", "microsoft/conditional-detr-resnet-50", "IDEA-Research/dab-detr-resnet-50",
    "SenseTime/deformable-detr", "PekingU/rtdetr_r18vd", "hustvl/yolos-tiny",
    "facebook/mask2former-swin-tiny-coco-instance",
)
# fmt: on
HUB = ("hf-hub:", "hf_hub:")


@dataclass(frozen=True)
class Source:
    """What a name stands for. label: `Target.weights` of its weights; architecture: a name of timm or of the hub, None
    where config, the folder's config.json, says what to build; checkpoint: a local file with the weights."""

    name: str
    label: str
    architecture: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    checkpoint: Path | None = None

    @property
    def is_timm(self) -> bool:
        if self.architecture is None:
            return bool(self.config.keys() & {"architecture", "arguments"})
        return "/" not in self.architecture or self.architecture.startswith(HUB)


def weights_folder() -> Path:
    """Where shipped targets lie, and downloaded weights may be put: data/weights of the project."""
    return project_root() / "data" / "weights"


def shipped_names() -> tuple[str, ...]:
    """The shipped targets that are there: the folders of data/weights with a model card."""
    return tuple(sorted(card.parent.name for card in weights_folder().glob("*/card.json")))


def resolve(name: str) -> Source:
    """Find what a name stands for, without reading weights and without network.

    Raises BacksightError, with nearest names, on an unknown name, a path that is not there, and a folder without
    config.json or with a broken one.
    """
    if not isinstance(name, str) or not name.strip():
        raise BacksightError("A target needs a name: `backsight targets` lists them.")
    placed = weights_folder() / (name.partition(":")[2] if name.startswith(HUB) else name)
    if not name.startswith((".", "/", "~")) and placed.is_dir():
        label = "shipped" if (placed / "card.json").exists() else "pretrained"
        named = None if (placed / "config.json").exists() else name
        return _local(name, label, placed, checkpoint_in(placed), named)
    if name in SHIPPED:
        raise BacksightError(
            f"The shipped target {name} is not in data/weights: restore the folder data/weights/{name} from the "
            f"repository or make it with notebooks/01_targets.ipynb ({_working()})."
        )
    before, _, rest = ("", "", name) if name.startswith(HUB) else name.rpartition("@")
    path = Path(rest.removeprefix("local-dir:")).expanduser()
    if not path.exists() and not rest.startswith((".", "/", "~", "local-dir:")) and not rest.endswith(SUFFIXES):
        return _known(Source(name, "pretrained", architecture=name))
    if not path.exists():
        raise BacksightError(f"There is no file or folder {str(path)!r}: check the path of the target.")
    if path.is_dir():
        return _local(name, name, path, checkpoint_in(path), before or None)
    if not path.name.endswith(SUFFIXES):
        raise BacksightError(
            f"{path.name} is no checkpoint: a target is a folder with config.json or a file in {', '.join(SUFFIXES)}."
        )
    if before and Path(before).expanduser().is_dir():
        return _local(name, name, Path(before).expanduser(), path, None)
    return _local(name, name, path.parent, path, before or None)


def _local(name: str, label: str, folder: Path, checkpoint: Path | None, architecture: str | None) -> Source:
    config = {} if architecture is not None else read_object(folder / "config.json")
    if architecture is None and not config:
        raise BacksightError(
            f"{checkpoint.name} says nothing of its architecture: put config.json beside it, or name the target "
            "NAME@path/to/checkpoint with a name of timm or an owner/name of transformers."
            if checkpoint
            else f"The folder {folder.name} has neither config.json nor a checkpoint, so it is no target."
        )
    return _known(Source(name, label, architecture, config, folder, checkpoint))


def _known(source: Source) -> Source:
    """The source itself. Raises BacksightError where neither timm nor transformers can have a model of this name."""
    import timm

    if source.config and not source.config.keys() & {"architecture", "arguments", "model_type"}:
        raise BacksightError(
            f"The config.json of {source.name} describes none of timm's models (architecture) and none of "
            "transformers' (model_type): correct it."
        )
    named = str(source.architecture or source.config.get("architecture", ""))
    if not source.is_timm or "arguments" in source.config or named.startswith(HUB):
        return source
    base, _, tag = named.partition(".")
    if not timm.models.is_model(base):
        known = [*SHIPPED, *USUAL, *timm.list_models()]
        raise BacksightError(f"There is no target {named!r}; {nearest(named, known)} (`backsight targets` lists them).")
    tags = timm.list_pretrained(f"{base}.*")
    if tag and named not in tags:
        raise BacksightError(f"timm has no weights {named}; there are: {', '.join(tags) or 'none'}.")
    return source


def _working() -> str:
    names = shipped_names()
    return f"these work now: {', '.join(names)}" if names else "no shipped target is made yet"


def is_local(name: str) -> bool:
    """Do the weights of a name lie in data/weights or in the hub's cache?"""
    import timm
    from huggingface_hub import constants, file_download

    if checkpoint_in(weights_folder() / name):
        return True
    repository = (name.partition(":")[2] or name).partition("@")[0]
    if "/" not in name:
        repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) or name
    cache = file_download.repo_folder_name(repo_id=repository, repo_type="model")
    return any(path.name.endswith(SUFFIXES) for path in Path(constants.HF_HUB_CACHE, cache, "snapshots").glob("*/*"))


@contextlib.contextmanager
def explained(source: Source, what: str) -> Iterator[None]:
    """timm, transformers and the hub's client raise many types on descriptions that somebody edited, and without
    network; say in one sentence what is wrong. what: the kind of model that is built."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except BacksightError:
        raise
    except Exception as error:
        if source.config or not isinstance(error, (OSError, EntryNotFoundError)):
            raise BacksightError(f"{source.name} describes no {what} ({reason(error)}): correct it.") from error
        repository = (source.name.partition(":")[2] or source.name).partition("@")[0]
        raise BacksightError(
            f"The files of {source.name} are neither in data/weights/{repository} nor in the Hugging Face cache, and "
            f"the hub does not give them ({reason(error)}): on a machine with network run `hf download {repository} "
            f"--local-dir data/weights/{repository}` and bring the folder here; {_working()}."
        ) from error


def reason(error: Exception) -> str:
    """Its first words, in one line."""
    return " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__


def checked_preprocessing(
    source: Source, mean: Any, std: Any, channels: int, size: tuple[int, ...], interpolation: str, crop: float
) -> Preprocessing:
    means, stds = ((value,) * channels if isinstance(value, (int, float)) else tuple(value) for value in (mean, std))
    if len(means) != channels or len(stds) != channels or min(stds) <= 0 or len(size) != 2 or min(size) < 1:
        raise BacksightError(
            f"The preprocessing of {source.name} says mean {means}, std {stds} and size {size} for images of "
            f"{channels} channels: give mean and std of {channels} positive values and a size in its configuration."
        )
    return Preprocessing(means, stds, (int(size[0]), int(size[1])), interpolation, crop)
