"""Targets: frozen models, their preprocessing and their taps.

    target = load_target("scenes-vit")
    representations = target.record(images)          # {tap: Representation}
    target.from_tap("blocks.2", representations["blocks.2"])

A new family of models is a class that implements `Target`; of detectors, one in detectors.py.
"""

from backsight.targets.base import PIXELS, TAP_SETS, Preprocessing, Stage, Target
from backsight.targets.discovered import ModuleTarget, module_target
from backsight.targets.load import list_targets, load_target
from backsight.targets.names import SHIPPED, weights_folder
from backsight.targets.survey import suggest_taps

__all__ = [
    "PIXELS",
    "SHIPPED",
    "TAP_SETS",
    "ModuleTarget",
    "Preprocessing",
    "Stage",
    "Target",
    "list_targets",
    "load_target",
    "module_target",
    "suggest_taps",
    "weights_folder",
]
