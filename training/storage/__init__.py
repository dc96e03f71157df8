"""Where everything is kept: local folders and object stores, the ledger, the registry and its cards.

Imports errors only. Knows no torch and nothing of how an adapter is made; it promises that a reader never sees half a
file and that a published version never changes."""
