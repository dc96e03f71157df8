"""What each photo shows, in the user's words: `<stem>.txt` beside a photo, or lines of one `captions.txt`.

`captions.txt` has one photo a line, `file.jpg: caption` or file and caption with a tab between. Blank lines and lines
that begin with `#` are skipped. A photo's own `.txt` wins over its line. Knows nothing about pixels or prompts.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from training.photos.warning import PhotoWarning, shown

CAPTIONS_FILE = "captions.txt"
MAX_FILE_BYTES = 2**20
MAX_CAPTION_CHARS = 1000


def captions(texts: Mapping[str, bytes], photo_names: Sequence[str]) -> tuple[dict[str, str], tuple[PhotoWarning, ...]]:
    """The caption of each photo that has one, and what could not be understood.

    `texts` maps the names of `.txt` files to their content; one that belongs to no photo is a note and is left alone.
    """
    found: dict[str, str] = {}
    warnings: list[PhotoWarning] = []
    stems = {PurePath(name).stem for name in photo_names}
    for name, data in sorted(texts.items()):
        if name.lower() == CAPTIONS_FILE:
            lines, bad = _captions_file(name, data, photo_names)
            found |= {photo: caption for photo, caption in lines.items() if photo not in found}
            warnings += bad
    for name, data in sorted(texts.items()):
        stem = PurePath(name).stem
        if name.lower() == CAPTIONS_FILE or stem not in stems:
            continue
        text, problem = _text(data)
        caption = " ".join(text.split())
        problem = problem or _problem(caption)
        if problem:
            warnings.append(_warning(name, problem))
        else:
            found |= {photo: caption for photo in photo_names if PurePath(photo).stem == stem}
    return found, tuple(warnings)


def _captions_file(name: str, data: bytes, photo_names: Sequence[str]) -> tuple[dict[str, str], list[PhotoWarning]]:
    text, problem = _text(data)
    if problem:
        return {}, [_warning(name, problem)]
    found: dict[str, str] = {}
    bad: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        photo, caption = _split(line)
        if not photo:
            bad.append(f"line {number}: neither `file.jpg: caption` nor file, tab, caption")
        elif photo not in photo_names:
            bad.append(f"line {number}: no photo named {shown(photo)}")
        elif photo in found:
            bad.append(f"line {number}: {shown(photo)} has a caption already")
        elif _problem(caption):
            bad.append(f"line {number}: {_problem(caption)}")
        else:
            found[photo] = caption
    listed = bad[:20] + ([f"and {len(bad) - 20} more"] if len(bad) > 20 else [])
    return found, [_warning(name, "; ".join(listed))] if bad else []


def _split(line: str) -> tuple[str, str]:
    """(photo, caption) of a line, ("", "") if it has no separator. A tab wins, as names may hold a colon."""
    photo, separator, caption = line.partition("\t" if "\t" in line else ":")
    return (photo.strip(), " ".join(caption.split())) if separator else ("", "")


def _text(data: bytes) -> tuple[str, str]:
    """(text, "") or ("", what is wrong)."""
    if len(data) > MAX_FILE_BYTES:
        return "", f"too long: {len(data)} bytes, at most {MAX_FILE_BYTES}"
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text at byte {error.start}"


def _problem(caption: str) -> str:
    if not caption:
        return "empty caption"
    if len(caption) > MAX_CAPTION_CHARS:
        return f"caption of {len(caption)} characters, at most {MAX_CAPTION_CHARS}"
    return "" if caption.isprintable() else "caption with control characters"


def _warning(name: str, problem: str) -> PhotoWarning:
    return PhotoWarning(
        "caption",
        (name,),
        f"{shown(name)}: {problem}.",
        "Mend it, or those photos train with the subject's instance prompt alone.",
    )
