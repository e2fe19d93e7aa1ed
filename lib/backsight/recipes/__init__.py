"""How the shipped targets are trained and scored.

folder = train_target(RECIPES["scenes-vit"], "data/weights/scenes-vit")
scores = score_target(load_target(str(folder)))
add_scores(folder / "card.json", scores, 5000, save=True)
"""

from backsight.recipes.card import add_scores, card_text
from backsight.recipes.data import BACKGROUND, SceneArrays, scene_arrays
from backsight.recipes.scores import average_precision, score_target
from backsight.recipes.training import RECIPES, Recipe, train_target

__all__ = [
    "BACKGROUND",
    "RECIPES",
    "Recipe",
    "SceneArrays",
    "add_scores",
    "average_precision",
    "card_text",
    "scene_arrays",
    "score_target",
    "train_target",
]
