"""The package's own interface: plain tensors in, a loss and its metrics out."""

from swiftsdpo.loss import sdpo_loss

__all__ = ["sdpo_loss"]
