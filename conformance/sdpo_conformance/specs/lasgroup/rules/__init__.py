"""lasgroup's rules as tests."""
