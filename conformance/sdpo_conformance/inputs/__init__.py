"""Who chooses an example's structure, and the inputs that no spec changes."""
