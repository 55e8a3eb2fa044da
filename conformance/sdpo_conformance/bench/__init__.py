"""Speed, memory and error of implementations on the same work, beside the bare product h @ W.T.

``workloads`` (what is computed) · ``inputs`` (the tensors) · ``subjects`` and ``peers`` (how an implementation
is called) · ``measuring``, ``memory``, ``judging`` (one row) · ``plugin`` and ``test_cells`` (rows as pytest
benchmarks) · ``running`` (worker processes) · ``results``, ``table``, ``markdown``, ``plots``, ``comparing``.
"""
