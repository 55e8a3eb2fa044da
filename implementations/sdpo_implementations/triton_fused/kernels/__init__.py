"""One kernel a file, its host wrapper beside it. Token-level arrays are flat: N = B * T tokens."""
