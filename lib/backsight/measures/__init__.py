"""Images and representations turned into numbers, one an image."""
