"""Inverses that are solved, not learnt: residual blocks as equations, and the most probable picture."""
