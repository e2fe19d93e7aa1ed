"""Values pooled into rows with intervals."""
