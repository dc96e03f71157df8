"""Images in: read with care, checked, varied, captioned, advised on.

May import `manifest`, `storage` and errors. Never imports torch and never writes: what it returns are pixels, captions
and findings."""
