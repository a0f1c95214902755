"""CPU backend: gather the key blocks of a query tile, then batched matrix products."""
