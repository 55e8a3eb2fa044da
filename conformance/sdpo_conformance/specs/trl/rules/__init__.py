"""TRL's rules as tests."""
