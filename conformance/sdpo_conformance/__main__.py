"""``python -m sdpo_conformance``."""

from sdpo_conformance.cli import main

if __name__ == "__main__":
    main()
