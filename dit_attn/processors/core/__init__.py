"""One attention call, one layer, the clock of a run and the executor; no host is known here."""
