"""Captions proposed for a subject's photos, and written beside them."""

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.captioning.captioner import Captioner, worded
from training.errors import UserError
from training.manifest.subject import SubjectSpec
from training.photos.photos import Photo


@dataclass(frozen=True, slots=True)
class Proposal:
    """A caption for a photo, or why there is none."""

    name: str
    caption: str | None = None
    problem: str | None = None


def propose(captioner: Captioner, subject: SubjectSpec, photos: Sequence[Photo]) -> Iterator[Proposal]:
    """A proposal for each photo, as they come; what goes wrong with one ends no other."""
    for photo in photos:
        try:
            said = captioner.describe(photo.image.copy(), subject.class_ or "")
        except UserError as error:
            yield Proposal(photo.name, problem=str(error))
        else:
            yield Proposal(photo.name, worded(said, subject))


def write_caption(folder: Path, proposal: Proposal, *, overwrite: bool) -> Path | None:
    """Writes a proposed caption beside its photo: `<stem>.txt`. Returns the file.

    Without `overwrite` a file that is there stays as it is, and None is returned. Raises UserError if it cannot be
    written.
    """
    file = folder / f"{Path(proposal.name).stem}.txt"
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(f"{proposal.caption}\n", encoding="utf-8")
        if overwrite:
            os.replace(temporary, file)
        else:
            os.link(temporary, file)  # fails if the file is there, and never leaves half of it
    except FileExistsError:
        return None
    except OSError as error:
        raise UserError(f"'{file}' cannot be written: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return file
