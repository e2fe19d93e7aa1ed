"""The explorer: one picture, one layer, one inverse, seen by hand.

view.py: what is looked at, as a value; workbench.py: what it shows, without any widget; page.py: the widgets of
notebooks/08_explorer.ipynb, with what they say (captions.py) and draw in the browser (elements.py, browser/);
serve.py: the page alone, by voila.
"""
