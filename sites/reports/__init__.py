"""The privacy officer's page: ``facts`` (what a ledger shows), ``reading`` (how they are recomputed from its rows),
``checklist`` (known hazards, held against them) and ``page`` (all in plain words, as one HTML file).

None of it needs torch or a site's key.
"""
