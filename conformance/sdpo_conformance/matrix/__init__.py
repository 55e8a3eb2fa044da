"""Several implementations against every requirement: a table, a JSON document, one HTML page, a badge for each.

``gather`` judges or reads back, ``columns`` and ``cells`` hold what was found, ``document``, ``table``, ``page``
and ``badge`` show it.
"""
