"""The catalogue of defects, the mutation score and the diagnosis."""
