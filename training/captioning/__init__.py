"""Captions that a model proposes for photos, for a person to correct: a model of the operator's, in a folder or behind
an OpenAI-compatible endpoint. Imports photos, manifest, base and what is below; writes only captions beside photos.
`settings` knows no torch."""
