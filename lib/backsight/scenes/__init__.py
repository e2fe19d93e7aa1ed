"""The built-in data set whose truth is known, and the five models that are trained on it."""
