"""One module per axis of the mesh; importing this package registers every rule."""

from sdpo_conformance.specs.claas.sharded.rules import batch, combined, sequence, vocabulary

__all__ = ["batch", "combined", "sequence", "vocabulary"]
