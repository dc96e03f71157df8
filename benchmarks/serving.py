"""Serving throughput: many adapters in one batch against what people run today, on one base in one run.

    python -m benchmarks.serving [--base pocket] [--steps 8] [--write]

Peers, same base, same steps, same adapters (rank 8, attention of UNet and text encoder: what a manifest trains unless
it says otherwise), guidance on:
(a) a diffusers pipeline that does load_lora_weights and unload_lora_weights for every request
(b) one with all adapters loaded that does set_adapters for every request
(c) PEFT's mixed batch: adapter_names for every row of one forward
(d) no adapter at all

Time is CPU time of the process on one thread, so that other work on the machine does not count. Open-loop arrivals run
in the same time: a step costs what it costs, and arrivals come when they are due.
"""

import argparse
import gc
import platform
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from serving.config import EngineSpec
from serving.engine.engine import Engine
from serving.engine.job import Done, Job, JobFailed
from serving.engine.pictures.codec import encode
from serving.engine.pictures.edit import decode_edit
from serving.engine.pictures.hints import NO_HINTS, Hints
from serving.engine.prompts import make_routes
from serving.engine.request import AdapterRef, AdapterUse, ControlUse, EditMask, GenerateRequest, NetworkRef
from serving.engine.tiers.adapters import Adapters
from tests.tiny import clip, clip_tokenizer, unet
from training.adapters.adapter import Adapter, LowRank, save_adapter
from training.adapters.layout import find_sites
from training.base.base import Base, load_base
from training.base.files.folder import EMBEDDED
from training.storage.networks import NetworkFolders
from training.storage.storage import LocalStorage

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
RESULT = Path(__file__).with_suffix(".md")
RANK, GUIDANCE, PROMPT, MAX_ROWS = 8, 4.0, "a photo of a dog on the grass", 32
Table = list[tuple[str, ...]]


def random_adapter(base: Base, seed: int, targets: Sequence[str] = ATTENTION) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    sites = find_sites("unet", base.denoiser, targets) + find_sites("text_encoder", clip(base), TEXT)
    for site in sites:
        tail = (1,) * (len(site.down) - 1)
        down = torch.randn(RANK, *site.down, generator=generator) * 0.02
        modules[site.key] = LowRank(down, torch.randn(site.out, RANK, *tail, generator=generator) * 0.02)
    return Adapter(modules)


def ref(index: int) -> AdapterRef:
    return AdapterRef(tenant="bench", id=f"a{index}", version="1")


def shelf(base: Base, count: int, targets: Sequence[str] = ATTENTION) -> dict[AdapterRef, Adapter]:
    return {ref(index): random_adapter(base, index, targets) for index in range(count)}


def best_s(works: dict[str, Callable[[], object]], repeat: int = 6) -> dict[str, float]:
    """CPU seconds of each, the best of `repeat` rounds that take turns, after a warm-up."""
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeat + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if turn:
                best[name] = min(best[name], time.process_time() - began)
    return best


# -- one denoising forward --


class Rows:
    """Inputs of a forward of `images` guided images."""

    def __init__(self, base: Base, images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        side, width = unet(base).config.sample_size, unet(base).config.cross_attention_dim
        self.images = images
        self.latents = torch.randn(2 * images, base.facts.channels, side, side, generator=generator)
        self.timesteps = torch.full((2 * images,), 500.0)
        self.states = torch.randn(2 * images, clip_tokenizer(base).model_max_length, width, generator=generator)

    @torch.inference_mode()
    def forward(self, unet: Any) -> None:
        unet(self.latents, self.timesteps, encoder_hidden_states=self.states)


def forwards(base: Base) -> Table:
    """A forward of 8 images (16 rows), each with its own adapter, against the base alone and PEFT's mixed batch."""
    rows, works = Rows(base, 8), dict[str, Callable[[], object]]()
    works["(d) base only"] = lambda: rows.forward(base.denoiser)
    made = [base_bank(base, targets) for targets in (ATTENTION, WIDE)]
    for name, adapters in zip(("attention", "attention, ff, proj, conv"), made, strict=True):
        for distinct in (8, 1):
            slots = [(index * distinct // 8,) for index in range(8) for _ in range(2)]
            with torch.inference_mode():
                routes = make_routes(adapters.bank, ["unet"], slots, [(1.0,)] * 16, adapters.empty)

            def work(adapters: Adapters = adapters, routes: list[Any] = routes) -> None:
                adapters.bank.inject()
                with adapters.bank.using(*routes):
                    rows.forward(base.denoiser)
                adapters.bank.eject()

            works[f"ours, {distinct} distinct, {name}"] = work
    for distinct in (1, 8):
        mixed = peft_mixed(base, distinct)
        names = [f"a{index * distinct // 8}" for index in range(8) for _ in range(2)]

        def call(mixed: Callable[[Rows, list[str]], None] = mixed, names: list[str] = names) -> None:
            mixed(rows, names)

        works[f"(c) PEFT mixed batch, {distinct} distinct, attention"] = call
    found = best_s(works)
    base_s = found["(d) base only"]
    return [(name, f"{1e3 * seconds:.0f} ms", f"{base_s / seconds:.2f}") for name, seconds in found.items()]


def base_bank(base: Base, targets: Sequence[str], slots: int = 8) -> Adapters:
    """A server's bank over the base (the adapters' layers, rank 32) with `slots` adapters; not yet injected."""
    adapters = Adapters(base, EngineSpec(slots=slots), lambda key: Adapter({}), threading.Event())
    ends = {"unet": targets, "text_encoder": TEXT}
    adapters.bank.cover({name: find_sites(name, model, ends[name]) for name, model in base.models.items()})
    for slot, adapter in enumerate(shelf(base, slots, targets).values()):
        adapters.bank.put(slot, adapters.bank.pack(adapter))
    adapters.bank.eject()
    return adapters


def peft_mixed(base: Base, count: int) -> Callable[[Rows, list[str]], None]:
    """A copy of the UNet with PEFT's layers, called with an adapter name for every row."""
    model = type(unet(base)).from_pretrained(base.folder / "unet").requires_grad_(False).eval()
    for index in range(count):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION), init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter_name=f"a{index}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def call(rows: Rows, names: list[str]) -> None:
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names}), with_kwargs=True
            )
            for layer in layers
        ]
        rows.forward(model)
        for hook in hooks:
            hook.remove()

    return call


# -- whole requests at saturation --


def request(index: int, adapter: int | None, steps: int, side: int) -> GenerateRequest:
    return GenerateRequest(
        prompt=PROMPT,
        adapters=() if adapter is None else (AdapterUse(ref=ref(adapter)),),
        width=side,
        height=side,
        seed=index,
        steps=steps,
        guidance_scale=GUIDANCE,
        deadline_s=86400,
    )


@contextmanager
def engine_over(
    base: Base, adapters: dict[AdapterRef, Adapter], slots: int, *, fixed_rows: bool = False
) -> Iterator[Engine]:
    spec = EngineSpec(device="cpu", slots=slots, max_rows=MAX_ROWS, queue=100_000, fixed_rows=fixed_rows)
    engine = Engine(base, spec, adapters.__getitem__)
    try:
        yield engine
    finally:
        engine.close()


def serve(engine: Engine, wanted: Sequence[tuple[float, GenerateRequest]]) -> tuple[float, list[float]]:
    """Serves requests that come at given times; CPU seconds until all are done, and each one's from its coming."""
    left, latencies = list(wanted), list[float]()
    jobs: dict[Job, float] = {}
    now = 0.0
    while left or jobs:
        if not jobs and left[0][0] > now:
            now = left[0][0]
        while left and left[0][0] <= now:
            came, one = left.pop(0)
            jobs[engine.submit(one, edit=None if one.mask is None else decode_edit(one))] = came
        if engine.idle:
            engine.woken.wait(1)
        engine.woken.clear()
        began = time.process_time()
        outcomes = engine.step()
        now += time.process_time() - began
        for outcome in outcomes:
            assert not isinstance(outcome, JobFailed), outcome
            if isinstance(outcome, Done):
                latencies.append(now - jobs.pop(outcome.job))
    return now, latencies


def saturated(base: Base, steps: int, side: int, images: int = 32) -> tuple[Table, dict[str, float]]:
    """Images a second with everything asked for at once: over 1, 2, 8, 32 distinct adapters, and the peers."""
    found: dict[str, float] = {}
    for distinct in (None, 1, 2, 8, 32):
        name = "(d) ours without adapters" if distinct is None else f"ours, {distinct} distinct adapters"
        with engine_over(base, shelf(base, distinct or 0), slots=32) as engine:
            wanted = [(0.0, request(i, None if distinct is None else i % distinct, steps, side)) for i in range(images)]
            serve(engine, wanted[:16])
            found[name] = images / min(serve(engine, wanted)[0] for _ in range(2))
    found |= peers(base, steps, side)
    table: Table = [
        (name, f"{rate:.2f} images/s", f"{found['ours, 8 distinct adapters'] / rate:.2f}")
        for name, rate in found.items()
    ]
    return table, found


def peers(base: Base, steps: int, side: int, count: int = 6) -> dict[str, float]:
    """What a diffusers pipeline does a second, request by request."""
    pipeline = StableDiffusionPipeline.from_pretrained(base.folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"a{index}.safetensors") for index in range(8)]
        for index, file in enumerate(files):
            file.write_bytes(save_adapter(random_adapter(base, index)))

        def draw() -> None:
            pipeline(PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE, height=side, width=side)

        def loaded(file: Path) -> None:
            pipeline.load_lora_weights(file)
            draw()
            pipeline.unload_lora_weights()

        def chosen(index: int) -> None:
            pipeline.set_adapters([f"a{index % 8}"], [1.0])
            draw()

        found["diffusers, no adapter, one by one"] = _rate(count, lambda index: draw())
        found["(a) load_lora_weights a request"] = _rate(count, lambda index: loaded(files[index]))
        for index, file in enumerate(files):
            pipeline.load_lora_weights(file, adapter_name=f"a{index}")
        found["(b) 8 loaded, set_adapters a request"] = _rate(count, chosen)
    return found


def _rate(count: int, work: Callable[[int], None]) -> float:
    """Calls a CPU second, the better of two runs after a warm-up."""
    work(0)
    best = float("inf")
    for _ in range(2):
        gc.collect()
        began = time.process_time()
        for index in range(count):
            work(index)
        best = min(best, time.process_time() - began)
    return count / best


def swaps(base: Base) -> Table:
    """What it takes to have another adapter: ours into a slot, diffusers' set_adapters with 8 and 32 loaded."""
    adapters = base_bank(base, ATTENTION)
    row = adapters.bank.pack(random_adapter(base, 99))
    works: dict[str, Callable[[], object]] = {
        "ours: a row of host memory into a slot": lambda: adapters.bank.put(3, row)
    }
    for count in (8, 32):
        model = type(unet(base)).from_pretrained(base.folder / "unet")
        for index in range(count):
            model.add_adapter(LoraConfig(r=RANK, target_modules=list(ATTENTION)), adapter_name=f"a{index}")

        def chosen(model: Any = model) -> None:
            model.set_adapters(["a1"], [1.0])

        works[f"diffusers set_adapters on the UNet, {count} loaded"] = chosen
    found = best_s(works)
    ours = next(iter(found.values()))
    return [(name, f"{1e3 * seconds:.2f} ms", f"{seconds / ours:.0f}") for name, seconds in found.items()]


def fixed_rows(base: Base, steps: int, side: int) -> Table:
    """What it costs to have the same bits in any company: so many images at once, with and without empty rows."""
    table: Table = []
    for images in (1, 4, 16):
        rates = []
        for fixed in (False, True):
            with engine_over(base, shelf(base, 8), 8, fixed_rows=fixed) as engine:
                wanted = [(0.0, request(i, i % 8, steps, side)) for i in range(images)]
                serve(engine, wanted)
                rates.append(images / min(serve(engine, wanted)[0] for _ in range(3)))
        free, padded = rates
        table.append((str(images), f"{free:.2f} images/s", f"{padded:.2f} images/s", f"{padded / free:.2f}"))
    return table


def masks(base: Base, steps: int, side: int, images: int = 32) -> Table:
    """Images a second where none, every second and every request redraws the left half of a picture."""
    found = {}
    adapters = shelf(base, 8)
    with engine_over(base, adapters, slots=8) as engine:
        for name, every in (("no masks", images + 1), ("every second masked", 2), ("all masked", 1)):
            wanted = [(0.0, request(i, i % 8, steps, side)) for i in range(images)]
            wanted = [(due, masked(one, i) if (i + 1) % every == 0 else one) for i, (due, one) in enumerate(wanted)]
            serve(engine, wanted[:16])
            found[name] = images / min(serve(engine, wanted)[0] for _ in range(3))
    return [(name, f"{rate:.2f} images/s", f"{rate / found['no masks']:.2f}") for name, rate in found.items()]


def masked(one: GenerateRequest, seed: int) -> GenerateRequest:
    """The request, of coloured noise whose left half is redrawn."""
    generator = torch.Generator().manual_seed(seed)
    pixels_HWC = torch.randint(0, 256, (one.height, one.width, 4), generator=generator, dtype=torch.uint8)
    pixels_HWC[..., 3] = 255 * (torch.arange(one.width) >= one.width // 2)
    changes = {"image": encode(pixels_HWC, "png", 100), "mask": EditMask(feather_px=4), "strength": 1.0}
    return one.model_copy(update=changes)


# -- networks beside the base --


def controlled(base: Base, steps: int, side: int, images: int = 16) -> Table:
    """Images a second with a ControlNet on none, half and all of the rows of the same forwards."""
    network = "pocket-canny"
    folders = NetworkFolders(LocalStorage(tempfile.gettempdir()), EMBEDDED)
    found = folders.look("control", network)
    assert found is not None
    use = ControlUse(ref=NetworkRef(kind="control", name=network, version=found.version), image=b"")
    hints = Hints((torch.randint(0, 2, (3, side, side), generator=torch.Generator().manual_seed(0)).byte() * 255,))
    rates = {}
    for name, share in (("no row", 0), ("half of the rows", 2), ("all rows", 1)):
        wanted = [request(index, None, steps, side) for index in range(images)]
        told = [
            one.model_copy(update={"controls": (use,)} if share and i % share == 0 else {})
            for i, one in enumerate(wanted)
        ]
        spec = EngineSpec(device="cpu", slots=1, max_rows=MAX_ROWS, queue=100_000)
        engine = Engine(base, spec, shelf(base, 0).__getitem__, open_network=folders.folder)

        def submit(one: GenerateRequest, engine: Engine = engine, plain: Any = engine.submit, **rest: Any) -> Job:
            return plain(one, hints=hints if one.controls else NO_HINTS)

        engine.submit = submit  # type: ignore[assignment, method-assign]
        try:
            serve(engine, [(0.0, one) for one in told])
            rates[name] = images / min(serve(engine, [(0.0, one) for one in told])[0] for _ in range(3))
        finally:
            engine.close()
    plain_rate = rates["no row"]
    return [
        (f"ControlNet on {name}", f"{rate:.2f} images/s", f"{rate / plain_rate:.2f}") for name, rate in rates.items()
    ]


# -- working sets and arrivals --


def zipf(choose: random.Random, count: int) -> int:
    """An adapter's index: the n-th most popular is asked for 1/n as often as the first."""
    return choose.choices(range(count), [1 / (rank + 1) for rank in range(count)])[0]


def working_sets(base: Base, steps: int, side: int, slots: int = 8, images: int = 48) -> Table:
    """Saturation throughput when more adapters are asked for, uniformly, than there are slots."""
    found = {}
    for count in (slots - 1, slots, slots + 1, 10 * slots):
        with engine_over(base, shelf(base, count), slots) as engine:
            wanted = [(0.0, request(i, i % count, steps, side)) for i in range(images)]
            serve(engine, wanted[:slots])
            found[f"{count} adapters, {slots} slots"] = images / serve(engine, wanted)[0]
    full = found[f"{slots} adapters, {slots} slots"]
    return [(name, f"{rate:.2f} images/s", f"{rate / full:.2f}") for name, rate in found.items()]


def arrivals(base: Base, steps: int, side: int, capacity: float, images: int = 60) -> Table:
    """Poisson arrivals over 32 adapters by Zipf's law at shares of what the engine can do."""
    table: Table = []
    for share in (0.3, 0.6, 0.85):
        choose, due, wanted = random.Random(1), 0.0, []
        for index in range(images):
            due += choose.expovariate(share * capacity)
            wanted.append((due, request(index, zipf(choose, 32), steps, side)))
        with engine_over(base, shelf(base, 32), slots=16) as engine:
            _, latencies = serve(engine, wanted)
        latencies.sort()
        p50, p95, p99 = (latencies[min(len(latencies) - 1, int(p * len(latencies)))] for p in (0.5, 0.95, 0.99))
        table.append(
            (f"{share:.0%} of capacity ({share * capacity:.2f}/s)", f"{p50:.2f} s", f"{p95:.2f} s", f"{p99:.2f} s")
        )
    return table


def markdown(title: str, heads: Sequence[str], table: Table) -> str:
    lines = [f"| {' | '.join(row)} |" for row in ([heads, ["---"] * len(heads), *table])]
    return f"### {title}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--write", action="store_true", help=f"into {RESULT.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    base = load_base(options.base, device="cpu")
    steps, side = options.steps, base.facts.resolution
    parts = []

    def tell(title: str, heads: Sequence[str], table: Table) -> None:
        parts.append(markdown(title, heads, table))
        print(parts[-1], flush=True)

    tell("One forward, 8 images, 16 rows", ["", "CPU time", "of base only"], forwards(base))
    tell("Another adapter", ["", "CPU time", "times ours"], swaps(base))
    table, rates = saturated(base, steps, side)
    tell(f"At saturation, {steps} steps, rank 8 attention", ["", "throughput", "8 distinct, times this"], table)
    tell("Working sets", ["", "throughput", "of set = slots"], working_sets(base, steps, side))
    if options.base == "pocket":
        tell("ControlNet (`pocket-canny`)", ["", "throughput", "of without"], controlled(base, steps, side))
    heads = ["images at once", "as many rows as there are", f"`fixed_rows`: always {MAX_ROWS}", "ratio"]
    tell("The same bits in any company", heads, fixed_rows(base, steps, side))
    tell("Masks, 8 distinct adapters", ["", "throughput", "of no masks"], masks(base, steps, side))
    capacity = rates["ours, 32 distinct adapters"]
    heads = ["Poisson, 32 adapters by Zipf, 16 slots", "p50", "p95", "p99"]
    tell("Arrivals", heads, arrivals(base, steps, side, capacity))
    if options.write:
        day = datetime.now(UTC).date().isoformat()
        where = f"{day}, base {options.base}, {platform.machine()} CPU, 1 thread, torch {torch.__version__}"
        kept = RESULT.read_text().partition("\n## ")[0] if RESULT.exists() else "# Serving\n"
        RESULT.write_text(f"{kept.rstrip()}\n\n## {where}\n\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
