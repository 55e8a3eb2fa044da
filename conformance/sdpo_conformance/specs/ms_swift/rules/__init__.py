"""ms-swift's rules as tests."""
