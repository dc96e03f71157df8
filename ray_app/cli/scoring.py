"""What `dreamfleet evaluate` does: from names and folders to scores and pictures. No maths, no printing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.adapters.adapter import load_adapter
from training.base.base import Base, load_base
from training.errors import UserError
from training.evaluation.compare import ComparedAdapter, Comparison, compare, contact_sheet
from training.evaluation.judges.box import JudgeBox
from training.evaluation.protocol import (
    JudgedSubject,
    Protocol,
    ProtocolSubject,
    load_protocol,
    run_protocol,
    write_parquet,
)
from training.photos.files import list_photo_files
from training.photos.photos import photos
from training.photos.variants import variants
from training.sampling.render import Look
from training.storage.registry import Registry
from training.storage.version import Resolved, UnknownAdapter

Alive = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wish:
    """How adapters are to be judged.

    `photos`: a folder of real photos, or of a folder a subject; `models`: of configured weights; `images` a prompt, the
    protocol's own by default; `steps` a picture, the base's own by default; `out` receives the pictures.
    """

    tenant: str = "default"
    base: str | None = None
    photos: Path | None = None
    models: Path | None = None
    likeness: str = "auto"
    fidelity: str = "auto"
    images: int | None = None
    steps: int | None = None
    out: Path = Path("out/evaluate")
    address: str | None = None


def resolve_all(registry: Registry, names: Sequence[str], tenant: str) -> list[Resolved]:
    """`[TENANT/]ID[@VERSION]` each; raises UnknownAdapter."""
    found = []
    for name in names:
        id, _, version = name.partition("@")
        found.append(registry.resolve(id, version or None, tenant))
    return found


def one_base(found: Sequence[Resolved], base: str | None) -> str:
    """The base that all of them were trained on; raises UserError if they differ."""
    hashes = {resolved.card.base_hash for resolved in found}
    if len(hashes) > 1:
        said = ", ".join(f"{resolved.name} on {resolved.card.base}" for resolved in found)
        raise UserError(f"These adapters belong to different bases: {said}. Compare those of one base.")
    return base or found[0].card.base


def _open_base(found: Sequence[Resolved], base: str | None) -> Base:
    """The base that all of them were trained on, loaded; raises UserError if what is here is another."""
    loaded = load_base(one_base(found, base), park_text=True)
    if loaded.hash != found[0].card.base_hash:
        raise UserError(
            f"Adapter {found[0].name} was trained on another '{found[0].card.base}' than this one. Give `--base` the "
            "folder of that one, or train it again."
        )
    return loaded


def compare_adapters(registry: Registry, names: Sequence[str], wish: Wish) -> Comparison:
    """Draws and scores adapters of one base; writes OUT/comparison.png."""
    found = resolve_all(registry, names, wish.tenant)
    loaded = _open_base(found, wish.base)
    judges = JudgeBox(loaded, wish.models).judges(wish.likeness, wish.fidelity)
    entries = [
        ComparedAdapter(
            f"{resolved.name}@{resolved.version[:12]}",
            load_adapter(registry.weights(resolved)),
            resolved.card,
            _photos(wish.photos, resolved.id, loaded.facts.resolution),
        )
        for resolved in found
    ]
    made = compare(loaded, entries, judges, images=wish.images or 2, steps=wish.steps)
    rows = [(name, pictures) for name, pictures in zip(made.names, made.pictures, strict=True)]
    wish.out.mkdir(parents=True, exist_ok=True)
    (wish.out / "comparison.png").write_bytes(contact_sheet(rows))
    return made


def evaluate_protocol(
    registry: Registry, name: str, subjects: Sequence[str], wish: Wish, alive: Alive | None = None
) -> tuple[Protocol, list[JudgedSubject], list[str]]:
    """Runs a protocol on the adapters that carry its subjects' ids; writes OUT/rows.parquet and a sheet a subject.

    Returns the protocol, what was judged, and the subjects that have no adapter or no photos here. Raises UserError if
    none is left.
    """
    protocol, photos = load_protocol(name), wish.photos
    if photos is None:
        raise UserError("A protocol needs real photos: give `--photos FOLDER` with a folder for each subject.")
    wanted = list(subjects) or list(protocol.subjects)
    strange = [subject for subject in wanted if subject not in protocol.subjects]
    if strange:
        raise UserError(f"Protocol '{name}' has no subject '{strange[0]}'. It has {', '.join(protocol.subjects)}.")
    there = {resolved.id: resolved for resolved in _published(registry, wanted, wish.tenant)}
    ready = [subject for subject in wanted if subject in there and (photos / subject).is_dir()]
    if not ready:
        raise UserError(
            f"None of the {len(wanted)} subjects has an adapter of tenant '{wish.tenant}' and a folder in {photos}. "
            f"Train adapters under the protocol's ids: {', '.join(list(protocol.subjects)[:4])}, ..."
        )
    loaded = _open_base([there[subject] for subject in ready], wish.base)
    sittings = [_sitting(registry, there[subject], photos, loaded) for subject in ready]
    look = Look(wish.steps or loaded.facts.steps, loaded.facts.guidance_scale, None)
    wish.out.mkdir(parents=True, exist_ok=True)
    judged = []
    for one in _sit_all(loaded, protocol, sittings, look, wish, alive):
        (wish.out / f"{one.subject}.png").write_bytes(one.sheet)
        judged.append(one)
    write_parquet([row for one in judged for row in one.rows], wish.out / "rows.parquet")
    return protocol, judged, [subject for subject in wanted if subject not in ready]


def _sit_all(
    base: Base, protocol: Protocol, sittings: Sequence[ProtocolSubject], look: Look, wish: Wish, alive: Alive | None
) -> Iterator[JudgedSubject]:
    """Every subject judged: here, or on a cluster."""
    if wish.address is None:
        box = JudgeBox(base, wish.models)
        judges, inception = box.judges(wish.likeness, wish.fidelity), box.inception()
        yield from run_protocol(
            base, protocol, sittings, judges, look=look, images=wish.images, inception=inception, alive=alive
        )
        return
    from ray_app.train.jury import spread_protocol

    judging = (str(base.folder), wish.models, wish.likeness, wish.fidelity)
    spread = spread_protocol(wish.address, judging, protocol, sittings, look, wish.images)
    for done, one in enumerate(spread, start=1):
        if alive:
            alive(one.subject, done, len(sittings))
        yield one


def _published(registry: Registry, ids: Sequence[str], tenant: str) -> Iterator[Resolved]:
    for id in ids:
        try:
            yield registry.resolve(id, tenant=tenant)
        except UnknownAdapter:
            continue


def _sitting(registry: Registry, resolved: Resolved, folder: Path, base: Base) -> ProtocolSubject:
    adapter = load_adapter(registry.weights(resolved))
    token = ComparedAdapter(resolved.name, adapter, resolved.card).rare
    return ProtocolSubject(resolved.id, adapter, token, _photos(folder, resolved.id, base.facts.resolution))


def _photos(folder: Path | None, id: str, side: int) -> list[Image.Image]:
    """The photos of a subject at the base's resolution: in FOLDER/ID, else in FOLDER itself."""
    if folder is None:
        return []
    own = folder / id if (folder / id).is_dir() else folder
    found = photos(list_photo_files(own), resolution=side, min_photos=1, with_report=False)
    return [Image.fromarray(variants(photo.image, side)[0]) for photo in found.good]
