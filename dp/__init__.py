"""Differential privacy at a site: what was released, what it costs, whether more may be released, and how.

``events`` (frozen descriptions of mechanisms), ``accountants`` (events to epsilon), ``ledger`` (the durable record, of
rows that ``chain`` lets anybody check and ``rows`` keeps in files), ``budget`` (the guard that refuses), ``noise``
(from a CSPRNG), ``gradients`` (each row's own, or refused), ``training`` (DP-SGD through Opacus), ``survival`` (a loss
that is a sum over patients), ``planning`` (what a run will cost), ``claims`` (whether a ledger's numbers hold),
``audit`` (what guesses prove) and ``canaries`` (whom they are about).  For noise that sites share: ``shared`` (the
plan, and sums to and from the ring), ``integer_noise`` (what is added) and ``divergences`` (what it costs).
"""
