"""Differential privacy at a site: what was released, what it costs, whether more may be released, and how.

``events`` (frozen descriptions of mechanisms), ``accountants`` (events to epsilon), ``ledger`` (the durable record, of
rows that ``chain`` lets anybody check and ``rows`` keeps in files), ``budget`` (the guard that refuses), ``noise``
(from a CSPRNG) and ``training`` (DP-SGD through Opacus).
"""
