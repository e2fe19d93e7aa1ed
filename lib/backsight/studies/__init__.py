"""What the notebooks ask and does not fit into their cells."""
