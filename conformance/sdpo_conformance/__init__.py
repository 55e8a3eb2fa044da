"""SDPO conformance: the CLaaS SDPO spec as executable property tests."""
