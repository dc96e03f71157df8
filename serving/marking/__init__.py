"""Marks of provenance: the message in the noise, signed metadata, and the serials that say whose a picture is.

May import `training.storage`, `training.base` (facts only) and errors; nothing else of serving.
"""
