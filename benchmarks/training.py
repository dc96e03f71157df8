"""Training throughput: packs of subjects against the usual loop, on one base in one run.

    python -m benchmarks.training [--base pocket] [--steps 12] [--threads 2] [--write]

Peers, same base, same LoRA (rank 8 on attention), same batch of one image a step, AdamW:
(a) the usual script: diffusers + PEFT, one subject at a time, VAE and text encoder in every step
(b) the same with latents and prompt embeddings cached
(c) as (a), one process per subject, its start-up included

Each line is measured in a process of its own, whose peak memory it has.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model

from tests.tiny import clip, clip_tokenizer, ddpm, vae
from training.adapters.adapter import Adapter
from training.base.base import Base, load_base
from training.base.words import tokenise
from training.manifest.defaults import fill_subject
from training.manifest.manifest import parse_manifest
from training.manifest.subject import SubjectSpec
from training.trainer.latents import LatentSet, posteriors
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {
    "usual": "(a) usual loop, one by one, nothing cached",
    "cached": "(b) usual loop, latents and embeddings cached",
}
NOTES = """
Targets, set for two CPU cores and a base of 4 M parameters: a pack of 8 at 4 times (a) and 3 times (b), with prior at 3
times, a pack of 32 at 8 times (a). With a larger base, one row already uses more of the peak arithmetic throughput, so
a pack gains less.
"""
RESULT = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Case:
    """What a row of the table measures: a peer of NAMES, or a pack of `size` subjects."""

    precision: str
    peer: str | None = None
    size: int = 1
    prior: bool = False

    @property
    def name(self) -> str:
        if self.peer:
            return NAMES[self.peer]
        return f"ours, pack of {self.size}" + (", with prior (2 rows a subject)" if self.prior else "")


@dataclass(frozen=True)
class Line:
    """One row of the table. `subjects_per_hour` at 400 steps each."""

    case: Case
    images_per_second: float
    memory_mb: float

    @property
    def subjects_per_hour(self) -> float:
        return 3600 * self.images_per_second / 400


def spec(index: int, prior: bool) -> SubjectSpec:
    text = json.dumps(
        {
            "version": 1,
            "name": "bench",
            "subjects": [
                {
                    "id": f"s{index}",
                    "images": "x",
                    "class": "dog",
                    "lora": {"text_encoder": False},
                    "prior": {"enabled": prior},
                    "train": {"seed": index, "max_steps": 10**6},
                }
            ],
        }
    )
    return parse_manifest(text).subjects[0]


def make_subject(base: Base, index: int, prior: bool) -> Subject:
    side = base.facts.resolution // base.facts.cell_px
    generator = torch.Generator().manual_seed(index)
    mean = torch.randn(5, base.facts.channels, side, side, generator=generator)
    made = fill_subject(spec(index, prior), base.facts)
    latents = LatentSet(posteriors(mean, 0.1 * torch.ones_like(mean)), (made.filled_instance_prompt,) * 5)
    return Subject(made, latents, LatentSet(posteriors(mean, 0 * mean), (made.filled_class_prompt,) * 5))


def timed(step: Callable[[], object], steps: int) -> float:
    """Median seconds of a step, after two that warm up."""
    for _ in range(2):
        step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]


def filled_pack(base: Base, indices: Sequence[int], prior: bool = False) -> Pack:
    pack = Pack(base, training_bank(base, slots=len(indices), rank=8, targets={"unet": TARGETS}))
    for index in indices:
        pack.join(make_subject(base, index, prior))
    return pack


def measure(case: Case, base_name: str, steps: int, threads: int) -> Line:
    """One case, in this process."""
    torch.set_num_threads(threads)
    base = load_base(base_name, dtype=PRECISIONS[case.precision])
    if case.peer:
        loop = UsualLoop(base, cached=case.peer == "cached")
        rate = 1 / timed(loop.step, steps * 3)
    else:
        pack = filled_pack(base, range(case.size), case.prior)
        rate = case.size * (2 if case.prior else 1) / timed(pack.step, steps)
    return Line(case, rate, peak_mb())


def peak_mb() -> float:
    """The most memory that this process had: of the GPU, or of its own with everything that it has loaded."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def largest_difference(base_name: str, subjects: int = 8, steps: int = 20) -> float:
    """Of any parameter, between a pack in fp32 and the same subjects one by one, after so many steps."""
    base = load_base(base_name, dtype=torch.float32)
    apart: list[Adapter] = []
    for group in (*([index] for index in range(subjects)), list(range(subjects))):
        pack = filled_pack(base, group)
        for _ in range(steps):
            pack.step()
        learned = [pack.adapter(f"s{index}") for index in group]
        pack.close()
        apart = apart + learned if len(group) == 1 else apart
    return max(
        float((half - other).abs().max())
        for one, alone in zip(learned, apart, strict=True)
        for key, low in one.modules.items()
        for half, other in zip(low, alone.modules[key], strict=True)
    )


class UsualLoop:
    """The training loop that everybody's script has: one subject, PEFT's layers, torch's AdamW."""

    def __init__(self, base: Base, cached: bool) -> None:
        self.base = base
        self.cached = cached
        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=list(TARGETS)), base.denoiser)
        self.parameters = [p for name, p in base.denoiser.named_parameters() if "lora_" in name]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.scheduler = DDPMScheduler.from_config(ddpm(base).config)
        self.pixels = torch.rand(5, 3, base.facts.resolution, base.facts.resolution, device=base.device) * 2 - 1
        self.subject = make_subject(base, 0, prior=False)
        self.tokens = tokenise(clip_tokenizer(base), [self.subject.spec.filled_instance_prompt], [{}]).ids.to(
            base.device
        )
        with torch.no_grad():
            self.embedding = clip(base)(self.tokens)[0]
        self.turn = 0

    def step(self) -> None:
        base, index = self.base, self.turn % 5
        self.turn += 1
        if self.cached:
            drawn = self.subject.instance.draw([index], torch.Generator().manual_seed(self.turn))
            latents = torch.stack(drawn).to(base.device)
            embedding = self.embedding
        else:
            with torch.no_grad():
                latents = vae(base).encode(self.pixels[index : index + 1].to(base.dtype)).latent_dist.sample()
                latents = latents * vae(base).config.scaling_factor
                embedding = clip(base)(self.tokens)[0]
        latents = latents.to(base.dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (1,), device=base.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = base.denoiser(noisy, timesteps, encoder_hidden_states=embedding).sample
        goal = noise
        if ddpm(base).prediction_type == "v_prediction":
            goal = self.scheduler.get_velocity(latents, noise, timesteps)
        torch.nn.functional.mse_loss(prediction.float(), goal.float()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def start_up(base: str) -> float:
    """Seconds that a process of its own needs before its first step: interpreter, imports, base."""
    code = f"from training.base.base import load_base; import peft; load_base({base!r})"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - started


def table(lines: Sequence[Line], asked: argparse.Namespace, seconds: float, difference: float, device: str) -> str:
    """Ratios are to the peer's faster precision, so that neither side is measured at its worse one."""
    one_by_one = max(line.images_per_second for line in lines if line.case.peer == "usual")
    cached = max(line.images_per_second for line in lines if line.case.peer == "cached")
    rows = [
        f"| {line.case.name} | {line.case.precision} | {line.images_per_second:.1f} | {line.subjects_per_hour:.0f} | "
        f"{line.images_per_second / one_by_one:.2f} | {line.images_per_second / cached:.2f} | {line.memory_mb:,.0f} |"
        for line in lines
    ]
    per_process = 3600 / (400 / one_by_one + seconds)
    head = [
        "# Training throughput",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {device}, torch {torch.__version__}, `{asked.base}`, {asked.threads} threads,",
        "rank 8 on attention, one image per subject and step unless stated otherwise: `python -m benchmarks.training`.",
        f"Best of {asked.rounds} rounds per line; ratios are to the faster precision of the peer.",
        "",
        "| | precision | images/s | subjects/hour (400 images) | x (a) | x (b) | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    tail = [
        f"| (c) as (a), a process per subject ({seconds:.1f} s start-up) | | | {per_process:.0f} | | | |",
        "",
        "Peak memory is that of the process, including interpreter, libraries and base. The largest difference of any",
        f"parameter between a pack of 8 and the same subjects one by one, fp32, 20 steps: {difference:.1e}.",
        "",
    ]
    return "\n".join([*head, *rows, *tail]) + NOTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="over all lines; each line's best counts")
    parser.add_argument("--sizes", default="1,2,4,8,16,32")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name} beside this program")
    asked = parser.parse_args()
    sizes = [int(size) for size in asked.sizes.split(",")]
    cases = [
        case
        for precision in PRECISIONS
        for case in (
            *(Case(precision, peer) for peer in NAMES),
            *(Case(precision, size=size) for size in sizes),
            Case(precision, size=8, prior=True),
        )
    ]
    best: dict[Case, Line] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case in cases * asked.rounds:
            line = pool.apply(measure, (case, asked.base, asked.steps, asked.threads))
            print(json.dumps(asdict(line)), file=sys.stderr, flush=True)
            best[case] = max(line, best.get(case, line), key=lambda one: one.images_per_second)
    lines = list(best.values())
    torch.set_num_threads(asked.threads)
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores {platform.machine()}"
    )
    text = table(lines, asked, start_up(asked.base), largest_difference(asked.base), device)
    print(text)
    if asked.write:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
