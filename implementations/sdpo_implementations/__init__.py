"""Implementations of the CLaaS SDPO loss that ship with the conformance suite."""
