"""What a vision transformer still knows, layer by layer, shown by inverting it.

    import backsight

    backsight.look("cat.jpg", "dinov2-small")  # a figure: every layer, turned back

    target = backsight.load_target("scenes-vit")
    recorded = target.record(images)  # (B, 3, H, W) in [0, 1]
    inverses = backsight.fit_linear(target, training_images)
    reconstructions = inverses["blocks.3"](recorded["blocks.3"])

Each name is loaded when it is first used: importing backsight alone touches nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BacksightError": "errors",
    "Chain": "inverses.module",
    "Inverses": "inverses.module",
    "Predictions": "representation",
    "Queries": "representation",
    "Tokens": "representation",
    "evaluate_quality": "studies.quality",
    "fit": "inverses.families",
    "fit_direct": "training.fit",
    "fit_exact": "exact.inverse",
    "fit_linear": "inverses.linear",
    "fit_map": "exact.map",
    "fit_modular": "training.fit",
    "fit_polish": "training.fit",
    "list_targets": "targets",
    "load": "inverses.files",
    "load_target": "targets",
    "look": "app.look",
    "module_target": "targets",
    "open_images": "data.images",
    "picture": "app.pictures",
    "record_features": "data.features",
    "save": "inverses.files",
    "suggest_taps": "targets",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'backsight' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"backsight.{_HOMES[name]}"), name)
