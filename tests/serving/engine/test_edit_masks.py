"""Pictures and masks of edits, decoded: what is redrawn, how it fades in, which part is drawn, what is refused."""

import pytest
from PIL import Image

from serving.engine.pictures.edit import decode_edit
from serving.engine.pictures.reference import decode_reference
from serving.errors import Refused
from tests.serving.engine.test_edits import LEFT, edit, photo, png, white


def test_a_feather_fades_in_from_the_edge_and_a_blur_reaches_beyond_it() -> None:
    mask = {"data": png(white((8, 0, 32, 32), 32, 32))}
    picture = png(photo(32, 32))
    plain, feathered, blurred = (
        decode_edit(edit(image=picture, width=32, height=32, mask={**mask, **how})).weight_HW[16].int()
        for how in ({}, {"feather_px": 3}, {"blur_px": 2.0})
    )
    assert plain.tolist() == [0] * 8 + [255] * 24
    assert feathered[:8].tolist() == [0] * 8 and feathered[8:12].tolist() == [63, 127, 191, 255]
    assert feathered[31] == 255  # the picture's border is no edge of the mask
    assert 0 < blurred[6] < blurred[9] < 255 and blurred[0] == 0


def test_only_the_masked_part_is_drawn_in_the_shape_of_the_request() -> None:
    picture = photo(200, 100)
    asked = edit(
        image=png(picture), width=32, height=16,
        mask={"data": png(white((150, 40, 160, 60), 200, 100)), "only_masked": True, "padding_px": 10},
    )  # fmt: skip
    found = decode_edit(asked)
    left, top, right, bottom = found.box
    assert left <= 140 and right >= 170 and top <= 30 and bottom >= 70 and (right - left) == 2 * (bottom - top)
    assert found.pixels_CHW.shape == (3, 16, 32) and found.whole_HWC.shape == (100, 200, 3)
    edge = decode_edit(
        asked.model_copy(update={"mask": asked.mask and asked.mask.model_copy(update={"padding_px": 1000})})
    )
    assert edge.box == (0, 0, 200, 100)


def test_the_transparency_of_the_picture_or_of_a_mask_says_what_is_redrawn() -> None:
    clear = photo().convert("RGBA")
    clear.putalpha(Image.eval(white(LEFT), lambda value: 255 - value))
    own = decode_edit(edit(image=png(clear), mask={"data": None, "means": "clear"}))
    other = decode_edit(edit(mask={"data": png(clear), "means": "clear"}))
    opaque = decode_edit(edit(mask={"data": png(clear), "means": "white", "inverted": True}))
    for found in (own, other, opaque):
        assert found.drawn_HW[:, :8].all() and not found.drawn_HW[:, 8:].any()


def test_an_edit_that_cannot_be_is_refused_in_words() -> None:
    full = photo().convert("RGBA")
    for request, said in (
        (edit(mask={"data": None, "means": "clear"}), "no mask, and the picture has no transparency"),
        (edit(mask={"data": png(white(LEFT, 8, 16))}), "mask has 8x16 px and the picture 16x16 px"),
        (edit(mask={"data": png(white((0, 0, 0, 0)))}), "leaves nothing to redraw: no part of it is white"),
        (edit(mask={"data": png(full), "means": "clear"}), "mask has no transparency"),
        (edit(mask={"data": b"GIF89a..."}), "mask cannot be used: a GIF"),
        (edit(image=b"%PDF"), "picture cannot be used: a PDF"),
    ):
        with pytest.raises(Refused, match=said):
            decode_edit(request)
    with pytest.raises(Refused, match="reference picture has 16x16 px; each side needs at least 32"):
        decode_reference(png(photo()), 32)
