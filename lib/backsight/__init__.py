"""backsight."""
