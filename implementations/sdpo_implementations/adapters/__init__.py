"""Published packages behind the protocol's entries, one module each, none of their code.

Importing this package imports no peer. Importing an adapter imports its peer, or raises ``NotInstalled``: one
line that says what to install. An adapter shows the peer's own convention: a field that the peer has no
counterpart for is not used, a result key that it reports nothing under is missing. docs/adapters.md teaches
writing one; docs/dialects.md sets the conventions side by side.
"""
