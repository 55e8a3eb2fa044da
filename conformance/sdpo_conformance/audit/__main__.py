"""`python -m sdpo_conformance.audit`."""

import typer

from sdpo_conformance.audit.audit_command import audit

if __name__ == "__main__":
    typer.run(audit)
