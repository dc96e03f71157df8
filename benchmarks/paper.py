"""A GPU's step on paper: what training and serving steps of real bases do, counted on the meta device, without a GPU.

    python -m benchmarks.paper [--base sd15 ...] [--json] [--places] [--write]

Training: a pack of eight subjects, each with one row of its photos and one of class images, rank 8 on attention, bf16,
fused attention. "alone" is the base's own forward and backward over as many rows, as if for the gradient of its input.
Serving: eight guided images with an adapter each in one step, against the base alone. Counts are exact. The times are a
roofline: no kernel is faster than its FLOPs, its bytes or a launch allow on an H100 (see `H100`), nothing overlaps, and
the host keeps up; they are a bound and no measurement.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.meta import META, Counts, counting
from benchmarks.real_sizes import SIZES, PaperBase, paper_base
from serving.config import EngineSpec
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, AdapterUse, GenerateRequest
from tests.training.subjects import latents, spec
from training.adapters.adapter import Adapter, LowRank
from training.adapters.layout import find_sites
from training.base.family import RowFacts
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank

RESULT = Path(__file__).with_suffix(".md")
SUBJECTS, RANK, IMAGES = 8, 8, 8
# dense bf16 and HBM3 of an H100 SXM at the shares that large kernels reach; a launch as CUDA's graphs have it
H100 = {"flops": 0.65 * 989e12, "bytes": 0.85 * 3.35e12, "launch_s": 3e-6}
NUMBERS = ("kernels", "casts", "flops", "bytes", "host_reads", "uploads", "peak_bytes")


@dataclass(frozen=True)
class Paper:
    """A step of ours beside the same rows through the base alone."""

    ours: Counts
    base: Counts

    def numbers(self) -> dict[str, float]:
        """All counts by name, those of the base alone as `base_...`, and both bounds in seconds."""
        found: dict[str, float] = {}
        for prefix, counts in (("", self.ours), ("base_", self.base)):
            found |= {prefix + name: getattr(counts, name) for name in NUMBERS}
            found[f"{prefix}seconds"] = counts.seconds(**H100)
        return found


def training(base: PaperBase, subjects: int = SUBJECTS) -> Paper:
    """A step of a pack in which nobody joins or leaves."""
    facts = base.facts
    side = base.latent_size(facts.resolution, facts.resolution)
    bank = training_bank(base, slots=subjects, rank=RANK, targets={facts.denoiser: facts.targets})
    pack = Pack(base, bank)
    for index in range(subjects):
        made = spec(f"s{index}", lora={"targets": list(facts.targets), "text_encoder": False, "rank": RANK})
        photos = latents(made.filled_instance_prompt, 2, index, (side,), facts.channels)
        pack.join(Subject(made, photos, latents(made.filled_class_prompt, 2, 99, (side,), facts.channels)))
    with counting():  # what is done once: prompts
        pack.step()
    with counting() as ours:
        pack.step()
    pack.close()
    rows = 2 * subjects
    x = torch.zeros(rows, facts.channels, *side, device=META, dtype=base.dtype, requires_grad=True)
    conds = base.encode(["a dog"] * rows)
    with counting() as alone:
        base.predict(x, torch.zeros(rows, device=META), conds, [RowFacts()] * rows).sum().backward()
    return Paper(ours, alone)


def serving(base: PaperBase, images: int = IMAGES) -> Paper:
    """A step whose company is that of the step before."""
    facts = base.facts
    engine = Engine(base, EngineSpec(device="cpu", slots=images, rank=RANK, max_rows=2 * images), _adapters(base))
    guidance = 4.0 if facts.guidance == "cfg" else 1.0
    for index in range(images):
        worn = AdapterUse(ref=AdapterRef(tenant="t", id=f"a{index}", version="1"))
        asked = {"width": facts.resolution, "height": facts.resolution, "steps": 9, "seed": index}
        request = {"prompt": "a dog", "guidance_scale": guidance, "scheduler": "euler", "adapters": (worn,), **asked}
        engine.submit(GenerateRequest.model_validate(request))
    with counting():
        while len(engine.scheduler.running) < images:
            engine.woken.wait(1)
            engine.step()
        engine.step()
    with counting() as ours:
        engine.step()
    engine.close()
    rows = images * (2 if guidance > 1 else 1)
    side = base.latent_size(facts.resolution, facts.resolution)
    x = torch.zeros(rows, facts.channels, *side, device=META, dtype=base.dtype)
    conds = base.encode(["a dog"] * rows)
    with torch.inference_mode(), counting() as alone:
        base.predict(x, torch.zeros(rows, device=META), conds, [RowFacts()] * rows)
    return Paper(ours, alone)


def _adapters(base: PaperBase) -> Any:
    sites = find_sites(base.facts.denoiser, base.denoiser, base.facts.targets)
    adapter = Adapter({s.key: LowRank(torch.ones(RANK, *s.down), torch.ones(s.out, RANK)) for s in sites})
    return lambda ref: adapter


def paper(name: str) -> dict[str, Paper]:
    """Both steps of one base."""
    with tempfile.TemporaryDirectory() as folder:
        base = paper_base(name, Path(folder))
        return {"training": training(base), "serving": serving(base)}


def table(found: dict[str, dict[str, Paper]], step: str) -> list[str]:
    """Markdown: a line a base."""
    heads = ("base", "kernels", "casts", "TFLOP", "GB moved", "host reads", "uploads", "peak GB", "bound, ms")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, papers in found.items():
        n = papers[step].numbers()
        both = (
            f"{n['kernels']} ({n['kernels'] / n['base_kernels']:.2f} x {n['base_kernels']})",
            f"{n['casts']} ({n['base_casts']})",
            f"{n['flops'] / 1e12:.1f} ({n['flops'] / n['base_flops']:.2f})",
            f"{n['bytes'] / 1e9:.1f} ({n['bytes'] / n['base_bytes']:.2f})",
            f"{n['host_reads']}",
            f"{n['uploads']}",
            f"{n['peak_bytes'] / 1e9:.1f} ({n['base_peak_bytes'] / 1e9:.1f})",
            f"{n['seconds'] * 1e3:.0f} ({n['seconds'] / n['base_seconds']:.2f})",
        )
        lines.append(f"| {name} | " + " | ".join(both) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--json", action="store_true", help="one object: base, step, numbers")
    parser.add_argument("--places", action="store_true", help="where the reads and uploads are")
    parser.add_argument("--write", action="store_true", help=f"into {RESULT.name}")
    asked = parser.parse_args()
    found = {name: paper(name) for name in asked.base}
    if asked.json:
        print(json.dumps({name: {step: p.numbers() for step, p in both.items()} for name, both in found.items()}))
        return
    text = []
    for step in ("training", "serving"):
        text += [f"### A {step} step", "", *table(found, step), ""]
    print("\n".join(text))
    if asked.places:
        for name, both in found.items():
            for step, one in both.items():
                print(name, step, *(f"\n   {count} {place}" for place, count in one.ours.by_place.most_common()))
                print("   more than alone:", (one.ours.by_operator - one.base.by_operator).most_common(25))
    if asked.write:
        kept = RESULT.read_text().partition("\n## ")[0] if RESULT.exists() else "# A step on paper\n"
        where = f"{datetime.now(UTC).date().isoformat()}, torch {torch.__version__}"
        RESULT.write_text(f"{kept.rstrip()}\n\n## {where}\n\n" + "\n".join(text))


if __name__ == "__main__":
    main()
