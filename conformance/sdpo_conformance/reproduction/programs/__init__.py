"""The programs that a failure leaves behind, as templates that run: ``program.py`` fills in their constants."""
