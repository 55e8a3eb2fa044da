"""Judging a step loop: tiny models, scenarios, what the recording optimizer saw, and what should have been.

Needs transformers and peft, which are imported where a model is built.
"""
