"""Right implementations of the loss that differ in method: the suite must find nothing in them."""
