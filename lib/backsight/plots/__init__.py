"""A tidy table turned into a figure; nothing is computed here."""
