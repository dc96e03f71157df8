"""AUTOMATIC1111's prompt syntax: how it is read, what is refused in words, and what the engine draws of it."""

from collections.abc import Iterator

import pytest
import torch

from serving.engine.engine import Engine
from serving.engine.samplers import ScheduleLines
from serving.engine.syntax import DEEPEST, JOINED, read_negative, read_prompt
from serving.errors import Refused
from tests.serving.company import Shelf, ask, finished, random_adapter, ref, small
from tests.serving.engine.test_engine import VISIBLE, near
from training.base.base import Base
from training.base.family import Wording
from training.base.wording import Phrase, Phrases

A = 1.1


def read(text: str) -> Wording:
    ((wording, weight),) = read_prompt(text, "a1111")
    assert weight == 1.0
    return wording


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        # the examples in AUTOMATIC1111's prompt_parser.py
        ("an (important) word", [("an ", 1.0), ("important", A), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", A)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", A)]),
        ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
         [("a ", 1.0), ("house", 1.3 * A * A), (" ", A), ("on", A * (1 / A)), (" a ", A), ("hill", 0.5 * A),
          (", sun, ", A), ("sky", A**4), (".", A)]),
        ("(a:1.2) (b:0.8)", [("a", 1.2), (" ", 1.0), ("b", 0.8)]),
        ("((dog))", [("dog", A * A)]),
        ("[dog]", [("dog", 1 / A)]),
        ("(dog : 1.5 )", [("dog ", 1.5)]),
        ("(dog:-0.5)", [("dog", -0.5)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
    ],
)  # fmt: skip
def test_weights(text: str, pieces: list[tuple[str, float]]) -> None:
    found = read(text)
    assert isinstance(found, Phrases)
    assert [part.text for part in found.parts] == [text for text, _ in pieces]
    assert [part.weight for part in found.parts] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"\(literal\]", "(literal]"),
        ("a dog: brown, 10:30", "a dog: brown, 10:30"),
        ("a dog)", "a dog)"),
        ("a (dog:1)", "a dog"),
        (r"a\b \\ c|d", r"a\b \ c|d"),
        ("", ""),
        ("BREAKFAST AND_MORE", "BREAKFAST AND_MORE"),
    ],
)
def test_what_has_no_weight_is_plain_text(text: str, plain: str) -> None:
    assert read(text) == plain
    assert read_prompt(text, "plain") == ((text, 1.0),)


def test_break_begins_a_chunk_also_within_brackets() -> None:
    assert read("a dog BREAK the snow") == Phrases((Phrase("a dog"), Phrase("the snow", opens=True)))
    assert read("(a BREAK b:2)") == Phrases((Phrase("a", 2.0), Phrase("b", 2.0, opens=True)))


def test_and_joins_prompts_with_weights() -> None:
    assert read_prompt("a dog AND a (red:2) cat :-0.5 AND snow:1.2", "a1111") == (
        ("a dog", 1.0), (Phrases((Phrase("a "), Phrase("red", 2.0), Phrase(" cat"))), -0.5), ("snow", 1.2),
    )  # fmt: skip
    assert read_negative("rain AND snow", "a1111") == "rain AND snow"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a [dog:cat:0.5]", "changes the prompt"),
        ("a [dog:10]", "changes the prompt"),
        ("a [dog::0.5] in snow", "changes the prompt"),
        ("a [dog|cat]", "changes the prompt"),
        ("(dog:1.2.3)", "no weight"),
        ("(dog:11)", "10"),
        ("((dog:9):9)", "81"),
        ("(" * (DEEPEST + 1) + "dog", "brackets"),
        ("dog AND " * JOINED + "cat", "AND"),
    ],
)
def test_what_is_not_done_is_refused_in_words(text: str, part: str) -> None:
    with pytest.raises(Refused, match=part):
        read_prompt(text, "a1111")
    assert read_prompt(text, "plain") == ((text, 1.0),)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("piece", ["(", "()", "(a", "[a]", "\\", ":", "(a:1)", "a:1", "|", "[", "AND", " ", ") ("])
def test_reading_takes_linear_time(piece: str) -> None:
    text = piece * (2**15 // len(piece))
    for read in (read_prompt, read_negative):
        try:
            read(text, "a1111")
        except Refused:
            continue


@pytest.fixture(scope="module")
def engine(tiny: Base) -> Iterator[Engine]:
    engine = Engine(tiny, small(), Shelf({ref("cat"): random_adapter(tiny, 1)}))
    yield engine
    engine.close()


def test_prompts_are_drawn_as_they_are_read(engine: Engine) -> None:
    plain, one, heavy, literal = finished(
        engine,
        [
            ask("cat", prompt="a red dog"),
            ask("cat", prompt="a (red:1.0) dog", prompt_syntax="a1111"),
            ask("cat", prompt="a (red:3) dog", prompt_syntax="a1111"),
            ask("cat", prompt="a (red:3) dog"),
        ],
    )
    assert torch.equal(plain, one)
    assert float((heavy - plain).abs().max()) > VISIBLE and float((heavy - literal).abs().max()) > VISIBLE


@pytest.mark.parametrize("scheduler", ["euler_a", "ddim"])
def test_joined_prompts_add_their_predictions(engine: Engine, scheduler: str) -> None:
    """One prompt twice at half weight each is that prompt; each is drawn beside rows of one prompt, as alone."""
    half = ask("cat", prompt="a red dog:0.5 AND a red dog:0.5", prompt_syntax="a1111", scheduler=scheduler)
    both = ask("cat", prompt="a red dog AND blue water:0.7", prompt_syntax="a1111", scheduler=scheduler, count=2)
    plain = ask("cat", prompt="a red dog", scheduler=scheduler)
    expected, halves = (finished(engine, [one])[0] for one in (plain, half))
    assert near(halves, expected)
    (alone,) = finished(engine, [both])
    assert float((alone[:1] - expected).abs().max()) > VISIBLE
    company = finished(engine, [plain, both, ask(prompt="snow", steps=2)])
    assert near(company[0], expected) and near(company[1], alone)


def test_joined_prompts_are_the_sum_that_is_documented(engine: Engine, tiny: Base) -> None:
    """One step of it against the same arithmetic over the base's own predictions."""
    request = ask(prompt="a red dog:0.8 AND blue water:0.4", prompt_syntax="a1111", negative_prompt="snow", steps=1,
                  guidance_scale=3.0, scheduler="ddim")  # fmt: skip
    (found,) = finished(engine, [request])
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(request.seed)
        schedule = tiny.process.schedule("ddim", 1, None, (found.shape[2], found.shape[3]))
        lines = ScheduleLines.gather([schedule], [0], tiny.device)
        latents = torch.randn(found.shape, generator=generator) * schedule.noise
        conds = tiny.encode(["snow", "a red dog", "blue water"])
        x = lines.model_input(latents).expand(3, -1, -1, -1)
        plain, dog, water = tiny.predict(x, lines.timesteps_N.expand(3), conds).split(1)
        output = plain + 3.0 * (0.8 * (dog - plain) + 0.4 * (water - plain))
        expected, _ = lines.step(latents, output, torch.zeros_like(latents), None)
    assert near(found, expected)
