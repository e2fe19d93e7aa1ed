"""A representation turned back: into the representation before it, or into an image."""
