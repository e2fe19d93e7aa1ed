"""Loops: modules of inverses (and the models themselves) trained by gradient descent."""
