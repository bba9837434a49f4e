"""Files on disk -> configuration and named tensors; everything in a file is validated before it is used."""
