"""The fleet's HTTP calls: files, jobs, runs, usage, tenants and keys. Routes parse, ask the desk and dump; no decision
is taken here."""
