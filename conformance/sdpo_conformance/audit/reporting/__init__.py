"""The audit's report: on a terminal, as JSON, as one HTML page."""
