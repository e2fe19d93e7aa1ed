"""Old home of rows.py, until all rooms have moved on."""

from backsight.inverses.rows import MAXIMUM_INPUTS, PIXELS, Form, Pair, area, form_of, plan_layout

__all__ = ["MAXIMUM_INPUTS", "PIXELS", "Form", "Pair", "area", "form_of", "plan_layout"]
