"""The demo: the main job on the embedded base, end to end, as a user would do it.

Trains the subjects of `manifests/demo` in one fused pack on Ray, serves them on Ray Serve, asks for all images at once
over HTTP, and writes `report.html` and `contact.png`. It leaves no process behind, also on Ctrl-C.
"""

import asyncio
import base64
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ray_app.cli.demo_report import DrawnImage, Mixed, Stage, SubjectStory, write_contact_sheet, write_page
from ray_app.serve.deployments import start_server
from ray_app.train.cluster import LOCAL, ClusterLimits
from ray_app.train.drive import Whole, drive_run
from training.errors import UserError
from training.manifest.manifest import Manifest
from training.manifest.subject import SubjectSpec
from training.photos.files import list_photo_files
from training.run.submission import Submission, submit
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.storage.version import Resolved

MANIFEST = Path(__file__).resolve().parents[2] / "manifests" / "demo" / "manifest.yaml"
CONTEXTS = ("in the snow", "at night", "in the water", "in the desert")  # in none of the photos
GOOD = ("published", "reused")
STEPS = 20
GUIDANCE = 3.0
REQUEST_TIMEOUT_S = 300.0


@dataclass
class Stages:
    """How long each part took, in order."""

    done: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Times what is done inside."""
        started = time.monotonic()
        yield
        self.done.append(Stage(name, time.monotonic() - started, what))


@dataclass(frozen=True)
class DemoImage:
    """One image to ask for: by adapter id, by several, or of the base alone (`adapters` empty)."""

    prompt: str
    seed: int
    adapters: tuple[tuple[str, float], ...] = ()

    def body(self, base: str) -> dict[str, Any]:
        """The JSON body of the images call."""
        return {
            "model": base,
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": STEPS,
            "guidance_scale": GUIDANCE,
            "adapters": [{"id": id, "weight": weight} for id, weight in self.adapters],
        }


def run_demo(out: Path, manifest: Path = MANIFEST) -> int:
    """Runs everything into `out`; returns the exit status: 0, or 1 if a subject failed."""
    if not manifest.is_file():
        raise UserError(f"The demo's photos are not installed ('{manifest}' is missing). Run it from a clone.")
    out.mkdir(parents=True, exist_ok=True)
    console, stages = Console(stderr=True), Stages()
    storage = str((out / "storage").resolve())
    submission = submit(manifest, open_storage(storage))
    subjects = submission.manifest.subjects
    started = time.monotonic()
    whole = drive_run(submission, LOCAL, ClusterLimits(), console)
    reused = sum(subject.state == "reused" for subject in whole.subjects)
    what = f"{len(subjects) - reused} subjects in one fused pack on Ray Train, published to the registry"
    what += f"; {reused} were published before" if reused else ""
    stages.done.append(Stage("train", time.monotonic() - started, what))
    trained = [spec for spec in subjects if _state(whole, spec.id) in GOOD]
    for spec in subjects:
        if spec not in trained:
            console.print(f"{spec.id} failed: {_reason(whole, spec.id)}")
    if not trained:
        return 1
    asks = _asks(trained)
    shots = _serve_and_draw(storage, submission.manifest.base, asks, stages, console)
    _write(out, manifest, submission, trained, shots, stages)
    console.print(f"look at {out / 'report.html'} and {out / 'contact.png'}")
    console.print(f"open the studio: `dreamfleet up --storage {out / 'storage'}`, then http://127.0.0.1:8000")
    return 0 if len(trained) == len(subjects) else 1


def _serve_and_draw(
    storage: str, base: str, asks: Sequence[DemoImage], stages: Stages, console: Console
) -> dict[DemoImage, DrawnImage]:
    started = time.monotonic()
    server = start_server(storage=storage, address=LOCAL, base=base, port=0)
    try:
        stages.done.append(Stage("start the server", time.monotonic() - started, "Ray Serve: HTTP ingress and engine"))
        adapters = len({ask.adapters for ask in asks if ask.adapters})
        what = f"{len(asks)} concurrent requests, {adapters} adapters and mixes and the bare base in one batch"
        with stages.stage("generate", what):
            images = asyncio.run(_draw_all(server.url, base, asks, console))
    finally:
        console.print("stopping the server")
        server.stop()
    return {ask: DrawnImage(ask.prompt, image) for ask, image in zip(asks, images, strict=True)}


def _asks(subjects: Sequence[SubjectSpec]) -> list[DemoImage]:
    """Every subject in every context with its adapter and without, and two adapters in one image."""
    asks = []
    for spec in subjects:
        for seed, context in enumerate(CONTEXTS):
            prompt = f"{spec.filled_instance_prompt} {context}"
            asks += [DemoImage(prompt, seed, ((spec.id, 1.0),)), DemoImage(prompt, seed)]
    return asks + _mixed_asks(subjects)


def _mixed_asks(subjects: Sequence[SubjectSpec]) -> list[DemoImage]:
    if len(subjects) < 2:
        return []
    first, second = subjects[0], subjects[1]
    prompt = f"{first.filled_instance_prompt} {CONTEXTS[1]}"
    weights = ((1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0))
    return [DemoImage(prompt, 7, ((first.id, one), (second.id, other))) for one, other in weights]


async def _draw_all(url: str, base: str, asks: Sequence[DemoImage], console: Console) -> list[bytes]:
    """All requests at once; the images in the order of `asks`."""
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("images", total=len(asks))

            async def draw(ask: DemoImage) -> bytes:
                response = await client.post("/v1/images/generations", json=ask.body(base))
                if response.status_code != 200:
                    raise UserError(f"The server returned {response.status_code}: {response.text[:500]}")
                progress.advance(bar)
                return base64.b64decode(response.json()["data"][0]["b64_json"])

            return list(await asyncio.gather(*(draw(ask) for ask in asks)))


def _write(
    out: Path,
    manifest: Path,
    submission: Submission,
    trained: Sequence[SubjectSpec],
    shots: dict[DemoImage, DrawnImage],
    stages: Stages,
) -> None:
    registry = Registry(submission.store.storage)
    described = _descriptions(manifest.parent / "images" / "subjects.json")
    stories = [_story(registry, spec, described.get(spec.id, ""), submission.manifest, shots) for spec in trained]
    mixed = [shots[ask] for ask in _mixed_asks(trained)]
    names = [f"{spec.id} ({spec.class_})" for spec in trained[:2]]
    caption = f"The same prompt and seed, from {' to '.join(names)} alone, with half of each in the middle."
    for story in stories:
        folder = out / "images" / story.id
        folder.mkdir(parents=True, exist_ok=True)
        for number, shot in enumerate(story.worn):
            (folder / f"{number}.png").write_bytes(shot.image)
    write_page(
        out / "report.html",
        base=submission.manifest.base,
        stages=stages.done,
        subjects=stories,
        mixed=Mixed(caption if mixed else "", tuple(mixed)),
    )
    write_contact_sheet(out / "contact.png", stories)


def _story(
    registry: Registry, spec: SubjectSpec, description: str, manifest: Manifest, shots: dict[DemoImage, DrawnImage]
) -> SubjectStory:
    resolved = registry.resolve(f"{manifest.tenant}/{spec.id}")
    asks = [(f"{spec.filled_instance_prompt} {context}", seed) for seed, context in enumerate(CONTEXTS)]
    files = list_photo_files(Path(manifest.root, spec.images))
    return SubjectStory(
        id=spec.id,
        class_name=spec.class_ or "",
        description=description,
        adapter=f"{manifest.tenant}/{spec.id}@{resolved.version[:12]}",
        steps=resolved.card.steps,
        loss=resolved.card.loss or 0.0,
        photos=tuple(file.data for file in files if file.name.endswith(".png")),
        loss_plot=_loss_plot(registry, resolved),
        worn=tuple(shots[DemoImage(prompt, seed, ((spec.id, 1.0),))] for prompt, seed in asks),
        bare=tuple(shots[DemoImage(prompt, seed)] for prompt, seed in asks),
    )


def _loss_plot(registry: Registry, resolved: Resolved) -> bytes | None:
    return registry.read(resolved, "loss.png") if "loss.png" in registry.files(resolved) else None


def _descriptions(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    return {entry["id"]: entry["description"] for entry in json.loads(file.read_text(encoding="utf-8"))}


def _state(whole: Whole, id: str) -> str:
    return next(subject.state for subject in whole.subjects if subject.id == id)


def _reason(whole: Whole, id: str) -> str | None:
    return next(subject.reason for subject in whole.subjects if subject.id == id)
