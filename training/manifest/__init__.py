"""What a user writes, checked and planned: the manifest, the gate on scores, and the plan of packs.

May import `base.folder` (configs and file headers), `storage` and errors. Never imports torch, reads no photo and
changes nothing on a storage: `dreamfleet validate` needs nothing slower, and ends within a second."""
