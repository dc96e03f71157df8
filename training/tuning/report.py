"""What a search leaves in a folder: `variants.json` after every rung, `scores.png` and `tuned.yaml` at its end."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from training.storage.local import write_file
from training.tuning.scores_plot import plot_scores
from training.tuning.tune import Tuned
from training.tuning.tuned import write_tuned
from training.tuning.variant import Variant, ranked

VARIANTS, PLOT, MANIFEST = "variants.json", "scores.png", "tuned.yaml"


def variant_json(variant: Variant) -> dict[str, object]:
    """A variant as `--json` and `variants.json` have it."""
    return {
        "variant": variant.number,
        "state": variant.state,
        "reason": variant.reason or None,
        "settings": dict(variant.settings),
        "rungs": [asdict(rung) for rung in variant.rungs],
    }


def write_variants(out: Path, variants: Sequence[Variant]) -> None:
    """Writes what is known of the variants so far, the best first."""
    rows = [variant_json(one) for one in ranked(variants)]
    write_file(out / VARIANTS, [json.dumps({"variants": rows}, indent=1).encode()])


def write_found(manifest: Path, out: Path, tuned: Tuned) -> Path | None:
    """Writes all files of a search that has ended. Returns the tuned manifest; None where no variant came to its
    end."""
    write_variants(out, tuned.variants)
    ids = [spec.id for spec in tuned.specs]
    title = f"variants of {', '.join(ids)}"
    write_file(out / PLOT, [plot_scores(tuned.variants, tuned.space, title)])
    if tuned.best is None:
        return None
    write_tuned(manifest, out / MANIFEST, ids, tuned.best.settings)
    return out / MANIFEST
