"""Files on disk -> configuration and named tensors; everything in a file is checked before it is believed."""
