"""The privacy officer's page: ``facts`` (what a ledger shows, recomputed), ``checklist`` (known hazards, held against
it) and ``page`` (both in plain words, as one HTML file).  None of it needs torch or a site's key."""
