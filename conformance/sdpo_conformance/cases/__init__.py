"""What every spec's inputs have in common."""
