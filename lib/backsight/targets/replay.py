"""The old name of `hooks`, for one landing."""

from backsight.targets.hooks import (  # noqa: F401
    Call,
    Element,
    Found,
    Place,
    element_of,
    frozen,
    playing,
    tensors_in,
    with_element,
)
from backsight.targets.hooks import recording as recording_places  # noqa: F401
