"""Differential privacy at a site: what was released, what it costs, whether more may be released, and how.

``events`` (frozen descriptions of mechanisms), ``accountants`` (events to epsilon), ``ledger`` (the durable record),
``budget`` (the guard that refuses), ``planning`` (what training will cost), ``noise`` (from a CSPRNG) and
``training`` (DP-SGD through Opacus).
"""
