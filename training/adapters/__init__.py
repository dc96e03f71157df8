"""Adapters: in memory, in a bank over a base, in files of every format, merged, fused and resized.

May import `base` and errors. Knows neither training nor serving: both use the same bank."""
