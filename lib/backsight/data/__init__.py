"""Files and generators turned into batches of images, or into recorded features."""
