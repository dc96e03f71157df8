"""The core: from a manifest to published adapters, on one machine, without Ray and without HTTP.

Rooms, each of which may import those below it: `tuning`, `trainer`, `evaluation`, `run`, `sampling`, `adapters`,
`photos`, `manifest`, `base`, `storage`. `errors` belongs to all of them."""
