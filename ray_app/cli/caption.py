"""`caption`: captions proposed by a model, written beside the photos of a manifest."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ray_app.cli import options
from serving.flags import flags
from training.captioning.settings import CaptionSpec
from training.errors import UserError

if TYPE_CHECKING:
    from training.captioning.captioner import Captioner
    from training.manifest.manifest import Manifest
    from training.manifest.subject import SubjectSpec
    from training.photos.photos import Photo


@dataclass(frozen=True)
class Captioned:
    """A photo that was looked at. `kept`: it had a caption, which was left alone."""

    subject: str
    photo: str
    caption: str | None = None
    kept: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class _Wanting:
    """A subject's photos that are to get a caption, and where they lie."""

    subject: "SubjectSpec"
    folder: Path
    photos: "Sequence[Photo]"


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="also photos that have a caption; their text files are replaced")
@options.as_json
@flags(CaptionSpec, "captions")
def caption(manifest: Path, overwrite: bool, as_json: bool, captions: CaptionSpec) -> None:
    """Propose captions for the photos of MANIFEST, and write each beside its photo as NAME.txt. Correct them before you
    train."""
    from training.captioning.captioner import open_captioner
    from training.run.submission import read_manifest

    checked, base = read_manifest(manifest)
    captioner = open_captioner(captions)
    wanting, looked = _wanting(checked, base.facts.resolution, overwrite)
    console = options.console(as_json)
    total = sum(len(one.photos) for one in wanting)
    columns = (TextColumn("captions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("captions", total=total)
        for one in _captioned(captioner, wanting, overwrite):
            looked.append(one)
            progress.advance(task)
    bad = [one for one in looked if one.problem is not None]
    if as_json:
        options.print_json({"model": captioner.name, "photos": [asdict(one) for one in looked]})
    else:
        for one in looked:
            said = one.problem or ("has a caption already" if one.kept else one.caption)
            console.print(f"{one.subject}/{one.photo}: {said}", markup=False)
        written = sum(one.caption is not None and not one.kept for one in looked)
        console.print(f"{written} captions by {captioner.name}. Read and correct them before you train.", markup=False)
    sys.exit(1 if bad else 0)


def _wanting(manifest: "Manifest", resolution: int, overwrite: bool) -> tuple[list[_Wanting], list[Captioned]]:
    """What is to get captions, and what is left alone. Raises UserError for photos that are in no folder here."""
    from training.photos.files import is_local, list_photo_files
    from training.photos.photos import photos

    wanting, left = [], []
    for subject in manifest.subjects:
        if not is_local(subject.images):
            raise UserError(
                f"Subject '{subject.id}': images '{subject.images[:80]}' are in no folder of this machine. Captions "
                "are written beside photos: copy them here first."
            )
        folder = Path(manifest.root, subject.images).expanduser()
        side = subject.train.resolution or resolution
        found = photos(list_photo_files(folder), resolution=side, min_photos=0, with_report=False)
        left += [
            Captioned(subject.id, photo.name, photo.caption, kept=True)
            for photo in found.good
            if photo.caption is not None and not overwrite
        ]
        asked = [photo for photo in found.good if photo.caption is None or overwrite]
        wanting.append(_Wanting(subject, folder, asked))
    return wanting, left


def _captioned(captioner: "Captioner", wanting: Sequence[_Wanting], overwrite: bool) -> Iterator[Captioned]:
    """Each photo once its caption lies beside it, or has failed."""
    from training.captioning.proposals import propose, write_caption

    for one in wanting:
        for proposal in propose(captioner, one.subject, one.photos):
            if proposal.problem is not None:
                yield Captioned(one.subject.id, proposal.name, problem=proposal.problem)
            elif write_caption(one.folder, proposal, overwrite=overwrite) is None:
                yield Captioned(one.subject.id, proposal.name, kept=True)
            else:
                yield Captioned(one.subject.id, proposal.name, proposal.caption)
