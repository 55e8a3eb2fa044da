"""The requirements as tests: one module per family of ids."""
