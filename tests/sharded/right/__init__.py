"""Right losses on a mesh that differ in method: the suite must find nothing in them."""
