"""Adapter files of other programs, one file a format. `formats` reads and writes them all."""
