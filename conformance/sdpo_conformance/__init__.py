"""SDPO conformance: the CLaaS SDPO spec as executable property tests.

import sdpo_conformance
report = sdpo_conformance.run("mypkg.loss", profile="quick")
assert report.conforming, report
"""

from sdpo_conformance.parametrize import parametrize_with_requirements
from sdpo_conformance.running.options import RunError
from sdpo_conformance.running.process import Report, run

__version__ = "0.1.0"

__all__ = ["Report", "RunError", "__version__", "parametrize_with_requirements", "run"]
