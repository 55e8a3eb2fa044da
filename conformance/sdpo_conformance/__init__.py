"""SDPO conformance: the CLaaS SDPO spec as executable property tests.

import sdpo_conformance
report = sdpo_conformance.run("mypkg.loss", profile="quick")
assert report.conforming, report
"""

from sdpo_conformance.running.options import RunError
from sdpo_conformance.running.process import Report, run

__all__ = ["Report", "RunError", "run"]
