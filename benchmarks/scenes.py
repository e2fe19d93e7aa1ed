"""How fast scenes are rendered: images a second at 64 px, on one process and on two, in memory and to disk.

About half a minute on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from table import Row, interleaved, write

from backsight.scenes.dataset import scene_tensors, write_coco
from backsight.scenes.render import render_many

IMAGES = 1000


def main() -> None:
    def to_disk() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_coco(Path(folder), "train", IMAGES)

    seconds = interleaved(
        {
            "one process": lambda: sum(1 for _ in render_many("train", IMAGES)),
            "two processes": lambda: scene_tensors("train", 4 * IMAGES, processes=2),
            "COCO folder": to_disk,
        }
    )
    goal_rate = 500.0
    rates = {
        "one process, in memory": IMAGES / seconds["one process"],
        "two processes, in memory, start of the processes included": 4 * IMAGES / seconds["two processes"],
        "one process, to disk in COCO's layout": IMAGES / seconds["COCO folder"],
    }
    write(
        "scenes",
        [
            Row("scenes", case, "rendered at 64 px", rate, "images/s", goal_rate, rate / goal_rate, "500 on two cores")
            for case, rate in rates.items()
        ],
    )


if __name__ == "__main__":
    main()
