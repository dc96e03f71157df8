"""Regions and schedules of weights: each is what it must equal, alone and beside rows of every other kind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.engine.covering import share_of_cells
from serving.engine.engine import Engine
from serving.engine.region import Region, WeightSpan, spans_of_words, weight_at
from serving.engine.request import AdapterUse, GenerateRequest, Hires
from serving.engine.syntax import read_prompt
from serving.errors import Refused
from tests.families import write_family
from tests.serving.company import WIDE, Shelf, ask, finished, picture, random_adapter, ref, run, small
from tests.training.base.test_families import adapter_over, sites_of
from training.adapters.adapter import Adapter
from training.adapters.bank import Bank
from training.adapters.coverage import Coverage
from training.adapters.layout import find_sites
from training.base.base import Base, load_base
from training.base.chat import asked
from training.base.phrases import find_phrase

CLOSE = 1e-4
PROMPT = "a photo of sks dog on the beach"
WHOLE, NOTHING = Region(box=(0, 0, 1, 1)), Region(cells=bytes(64), words=())
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
FAMILIES = ("sd", "sdxl", "klein", "z-image", "flux")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(write_family(request.param, tmp_path_factory.mktemp("regions"))), device="cpu")


def every_layer(base: Base, seed: int) -> Adapter:
    """An adapter over every layer that one may change."""
    return adapter_over([site for found in sites_of(base).values() for site in found], seed, size=0.3)


@pytest.fixture
def engine(base: Base) -> Iterator[Engine]:
    made = Engine(base, small(), Shelf({ref(name): every_layer(base, seed) for seed, name in enumerate("ab")}))
    yield made
    made.close()


def wearing(base: Base, *uses: AdapterUse, **changes: Any) -> GenerateRequest:
    found = {"prompt": PROMPT, "scheduler": base.facts.sampler, "width": 32, "height": 32, **changes}
    return ask(adapters=uses, **found)


def use(name: str, region: Region | None = None, **changes: Any) -> AdapterUse:
    return AdapterUse(ref=ref(name), region=region, **changes)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


def side(base: Base, size_px: int = 32) -> tuple[int, int]:
    return base.latent_size(size_px, size_px)


# -- every family: whole, nothing, parts, company


def test_the_whole_picture_is_no_region_and_nothing_is_the_base(engine: Engine) -> None:
    base = engine.base
    plain, bare = finished(engine, [wearing(base, use("a")), wearing(base)])
    nothing = Region(cells=bytes(side(base)[0] * side(base)[1]), words=())
    whole, none = finished(engine, [wearing(base, use("a", WHOLE)), wearing(base, use("a", nothing))])
    assert apart(whole, plain) < CLOSE
    assert apart(none, bare) < CLOSE
    assert apart(plain, bare) > 0.01


def test_rows_with_and_without_regions_equal_themselves_alone(engine: Engine) -> None:
    base = engine.base
    asked = [
        wearing(base, use("a", Region(box=LEFT, words=("sks dog",))), use("b", Region(box=RIGHT, words=("beach",)))),
        wearing(base, use("b", Region(box=LEFT)), seed=2),
        wearing(base, use("a", weight=0.7), use("b"), seed=3, prompt="a cat"),
        wearing(base, seed=4),
        wearing(base, use("a", Region(words=("dog",))), seed=5, guidance_scale=1.0),
    ]
    together = finished(engine, asked)
    for one, latents in zip(asked, together, strict=True):
        assert apart(latents, finished(engine, [one])[0]) < CLOSE
    (plain,) = finished(engine, [wearing(base, use("a"), use("b"))])
    assert apart(together[0], plain) > 0.01


def inputs_of_layers(base: Base, size: tuple[int, int], cond: Any, seed: int) -> dict[str, Tensor]:
    """What every layer of the denoiser sees of a noise, by its name, in the order in which they are called."""
    name, seen = base.facts.denoiser, dict[str, Tensor]()
    hooks = [
        site.layer.register_forward_hook(
            lambda _layer, given, _made, key=site.key: seen.update({key.removeprefix(f"{name}."): given[0]})
        )
        for site in find_sites(name, base.denoiser, base.facts.layers)
    ]
    noise = torch.randn(1, base.facts.channels, *size, generator=torch.Generator().manual_seed(seed))
    base.predict(noise, torch.tensor([500.0]), [cond])
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_every_layer_sees_the_tokens_that_its_family_says(base: Base) -> None:
    """By their number; where a layer sees picture and prompt in one sequence, other noise changes the picture's."""
    tokens, size, cond = base.facts.tokens, side(base, 48), base.encode([PROMPT])[0]
    words, picture = tokens.filled(len(cond["states"])), tokens.picture_tokens(size)
    assert words != picture
    seen = inputs_of_layers(base, size, cond, seed=0)
    for layer, given in seen.items():
        kind, count = tokens.kind(layer), given[0, ..., 0].numel()
        if given.ndim == 4:
            assert kind == "picture", layer
        elif kind == "picture":
            tokens.grid(size, count)
        else:
            assert count == {"text": words, "both": words + picture, "row": 1}[kind], layer
    both = [layer for layer in seen if tokens.kind(layer) == "both"]
    assert bool(both) == (base.facts.denoiser == "transformer")
    if both:
        blocks = getattr(base.denoiser, "transformer_blocks", None)
        if blocks is not None:  # in these, prompt and picture see each other
            base.denoiser.transformer_blocks = torch.nn.ModuleList()
        one, other = (inputs_of_layers(base, size, cond, seed)[both[0]] for seed in range(2))
        if blocks is not None:
            base.denoiser.transformer_blocks = blocks
        first = words if tokens.text_first else 0
        moved = (one != other).any(dim=-1)[0].nonzero().flatten().tolist()
        assert moved == list(range(first, first + picture))


def ids_of(base: Base, prompt: str) -> tuple[Any, list[int]]:
    """The tokenizer that a prompt's record is made with, and the record's ids."""
    tokenizers = base.parts.tokenizers
    tokenizer: Any = tokenizers["text_encoder_2" if base.facts.family == "flux-1" else "text_encoder"]
    text = prompt
    if base.facts.family in ("flux-2-klein", "z-image"):
        text = asked(tokenizer, prompt, thinking=base.facts.family == "z-image")
    return tokenizer, tokenizer(text).input_ids


def test_a_phrase_is_at_its_own_tokens(base: Base) -> None:
    prompt = "a photo of a red toy on the beach"
    (span,) = find_phrase(prompt, "red toy")
    tokenizer, ids = ids_of(base, prompt)
    places = base.family.places(base.parts, prompt, [span], {})
    assert places == list(range(places[0], places[-1] + 1))
    assert tokenizer.decode([ids[place] for place in places]).strip() == "red toy"
    if base.facts.word_widths:  # a trained word of two vectors moves what stands behind it
        word = {"<s1>": torch.zeros(2, base.facts.word_width)}
        moved = base.family.places(base.parts, f"<s1> {prompt}", [(span[0] + 5, span[1] + 5)], word)
        assert moved == [place + 2 for place in places]
        assert base.family.places(base.parts, f"<s1> {prompt}", [(0, 4)], word) == [1, 2]


# -- Stable Diffusion alone: what a part is


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(write_family("sd", tmp_path_factory.mktemp("regions"))), device="cpu")


@pytest.fixture
def serving(sd: Base) -> Iterator[Engine]:
    adapters = {ref(name): random_adapter(sd, seed, targets=WIDE) for seed, name in enumerate("ab")}
    for name, part in (("a-unet", "unet."), ("a-text", "text_encoder.")):
        kept = {key: low for key, low in adapters[ref("a")].modules.items() if key.startswith(part)}
        adapters[ref(name)] = Adapter(kept)
    made = Engine(sd, small(), Shelf(adapters))
    yield made
    made.close()


@torch.no_grad()
def test_a_layer_is_the_bases_outside_of_a_region_and_the_adapters_inside(sd: Base) -> None:
    """At every resolution: attention, convolutions with and without a stride, the prompt's keys and values."""
    sites = find_sites("unet", sd.denoiser, sd.facts.layers)
    bank = Bank({"unet": sites}, slots=1, rank=4)
    bank.put(0, bank.pack(adapter_over(sites, 1)))
    bank.inject()
    cover = torch.zeros(1, 1, 8, 8)
    cover[..., :4] = 1
    route = bank.route("unet", torch.tensor([[0]]))
    kinds = {index: sd.facts.tokens.kind(site.key.removeprefix("unet.")) for index, site in enumerate(sites)}
    held: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        site.layer.register_forward_hook(lambda _l, given, made, key=site.key: held.update({key: (given[0], made)}))
        for site in sites
    ]
    with bank.using(route.covered(Coverage(sd.facts.tokens, cover, [[(3, 4)]]), kinds)):
        sd.predict(torch.randn(1, 4, 8, 8), torch.tensor([300.0]), sd.encode([PROMPT]))
    for hook in hooks:
        hook.remove()
    seen = set()
    inside: tuple[Any, ...]
    outside: tuple[Any, ...]
    for index, site in enumerate(sites):
        given, made = held[site.key]
        layer: Any = site.layer
        plain = type(layer).forward(layer, given)
        with bank.using(route):
            worn = site.layer(given)
        if made.ndim == 4:  # cells: the left half wears it
            half = made.shape[3] // 2
            inside, outside = (..., slice(0, half)), (..., slice(half, None))
        elif kinds[index] == "text":
            inside, outside = (slice(None), slice(3, 5)), (slice(None), [0, 1, 2, *range(5, made.shape[1])])
        elif kinds[index] == "row":
            assert torch.allclose(made, plain + 0.5 * (worn - plain), atol=1e-4)
            continue
        else:
            edge = int(made.shape[1] ** 0.5)
            left = [place for place in range(edge * edge) if place % edge < edge // 2]
            inside = (slice(None), left)
            outside = (slice(None), sorted({*range(edge * edge)} - {*left}))
        assert torch.allclose(made[inside], worn[inside], atol=1e-4), site.key
        assert torch.allclose(made[outside], plain[outside], atol=1e-4), site.key
        assert not torch.allclose(made[inside], plain[inside], atol=1e-4), site.key
        seen.add((made.ndim, kinds[index], made.shape[-1] if made.ndim == 4 else made.shape[1]))
    bank.eject()
    assert seen == {(4, "picture", 8), (4, "picture", 4), (3, "picture", 16), (3, "text", 16)}


def test_edges_fall_off_but_not_at_the_border_of_the_picture() -> None:
    hard = share_of_cells(Region(box=LEFT, feather=0), (8, 8))
    assert hard[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    part = share_of_cells(Region(box=(0.25, 0, 0.4375, 1), feather=0), (8, 8))  # one cell and a half
    assert part[3].tolist() == pytest.approx([0, 0, 1, 0.5, 0, 0, 0, 0])
    soft = share_of_cells(Region(box=LEFT, feather=0.5), (8, 8))[0]
    assert soft[0] == 1 and soft.tolist() == sorted(soft.tolist(), reverse=True)
    assert soft[3] + soft[4] == pytest.approx(1) and 0 < float(soft[5]) < float(soft[4]) < 1
    assert share_of_cells(Region(box=(0, 0, 1, 1), feather=1), (8, 6)).eq(1).all()
    assert share_of_cells(Region(cells=bytes([255] * 8 + [51] * 56)), (8, 8))[1, 0] == pytest.approx(0.2)


def test_a_phrase_that_stands_as_often_as_it_is_named_is_shared_out_in_order() -> None:
    prompt = "a Sks  dog and a sks dog, dogs"
    assert [prompt[begin:end] for begin, end in find_phrase(prompt, "sks dog")] == ["Sks  dog", "sks dog"]
    one, two = (Region(words=("sks dog",)) for _ in range(2))
    first, second = find_phrase(prompt, "sks dog")
    assert spans_of_words(prompt, [one, None, two]) == [[first], None, [second]]
    assert spans_of_words(prompt, [one]) == [[first, second]]


def test_the_text_encoder_is_changed_at_the_words_alone(serving: Engine) -> None:
    """Of a causal encoder: the tokens before the words stay, those behind them see the changed ones."""
    asked = wearing(serving.base, use("a", Region(words=("sks dog",))))
    jobs = [serving.submit(one) for one in (asked, wearing(serving.base))]
    while any(job.conds is None for job in jobs):
        serving.woken.wait(0.02)
        serving.step()
    worn, plain = (job.conds[0]["states"] for job in jobs if job.conds is not None)
    assert torch.equal(worn[:4], plain[:4])  # start, a, photo, of
    assert (worn[4:] != plain[4:]).any(dim=1).all()
    negatives = [job.conds[1]["states"] for job in jobs if job.conds is not None and job.conds[1] is not None]
    assert torch.equal(*negatives)


def test_words_that_are_not_there_are_refused_as_are_words_in_a_second_chunk(serving: Engine) -> None:
    with pytest.raises(Refused, match="'red' are not among the tokens"):
        picture(serving, wearing(serving.base, use("a", Region(words=("red",)))))
    long = PROMPT + " a cat" * 6
    with pytest.raises(Refused, match="takes 2 chunks of 14 tokens"):
        picture(serving, wearing(serving.base, use("a", Region(words=("dog",))), prompt=long))
    for taken in (use("a-unet", Region(words=("dog",))), use("a", Region(box=LEFT, words=()))):
        assert len(picture(serving, wearing(serving.base, taken, prompt=long))) == 1


# -- prompts of regions


def test_a_whole_region_with_a_prompt_is_a_picture_of_that_prompt(engine: Engine) -> None:
    """Whatever the others wear; and beside others it is what it is alone."""
    base = engine.base
    own = Region(box=(0, 0, 1, 1), prompt="a red toy")
    asked = wearing(base, use("a", own), use("b", Region(cells=bytes(side(base)[0] * side(base)[1]), words=())))
    left = Region(box=LEFT, words=(), prompt="a red toy")
    two = wearing(base, use("a", left), use("b", Region(box=RIGHT, words=("beach",), prompt="a cat")), seed=2)
    made, both, plain, _ = finished(
        engine, [asked, two, wearing(base, use("a"), prompt="a red toy"), wearing(base, use("b"), seed=3, steps=2)]
    )
    assert apart(made, plain) < CLOSE
    assert apart(both, finished(engine, [two])[0]) < CLOSE
    assert apart(both, finished(engine, [wearing(base, use("a", left), seed=2)])[0]) > 0.01


def test_more_prompts_than_a_forward_has_rows_for_are_refused(serving: Engine) -> None:
    uses = tuple(use("a", Region(box=LEFT, words=(), prompt="a cat")) for _ in range(15))
    with pytest.raises(Refused, match="15 regions have prompts, and a forward of this size takes 2 here"):
        serving.submit(wearing(serving.base, *uses))


# -- beside weighted words, a second pass and reference pictures


def test_words_are_found_among_weighted_ones_and_not_beside_and(serving: Engine) -> None:
    base, plain = serving.base, "a photo of sks dog on the beach"
    (part, _), *_ = read_prompt("a photo of (sks) [dog] on the beach", "a1111")
    (span,) = find_phrase(str(part), "sks dog")
    (same,) = find_phrase(plain, "sks dog")
    assert base.family.places(base.parts, part, [span], {}) == base.family.places(base.parts, plain, [same], {})
    region = Region(box=LEFT, words=("sks dog",))
    with pytest.raises(Refused, match="with AND and adapters with regions"):
        serving.submit(wearing(base, use("a", region), prompt="a dog AND a cat", prompt_syntax="a1111"))


def test_a_region_is_enlarged_with_its_picture(serving: Engine) -> None:
    larger: dict[str, Any] = {"width": 16, "height": 16}
    larger["hires"] = Hires(width=32, height=32, steps=2, strength=0.6, upscaler="latent")
    base, spans = serving.base, (WeightSpan(start=0, end=1, weight=1.0),)
    cells = Region(cells=bytes([255]) * 64)
    plain, whole, bare = finished(
        serving,
        [
            wearing(base, use("a"), **larger),
            wearing(base, use("a", cells, schedule=spans), **larger),
            wearing(base, **larger),
        ],
    )
    own = Region(box=LEFT, words=(), prompt="a cat")
    assert plain.shape[-1] == 16
    assert apart(whole, plain) < CLOSE and apart(whole, bare) > 0.01
    assert finished(serving, [wearing(base, use("a", own), **larger)])[0].shape == plain.shape


def test_tokens_of_reference_pictures_are_behind_the_regions(engine: Engine) -> None:
    base = engine.base
    if not base.facts.references:
        pytest.skip("it takes no references")
    picture = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = []
    for worn in (use("a"), use("a", WHOLE), use("a", Region(box=LEFT))):
        job = engine.submit(wearing(base, worn), references=[picture])
        (sample,) = job.samples
        run(engine, [job])
        made.append(sample.at)
    assert apart(made[1], made[0]) < CLOSE < apart(made[2], made[0])


# -- weights


def test_text_encoder_and_denoiser_have_weights_of_their_own(serving: Engine) -> None:
    base = serving.base
    asked = [
        wearing(base, use("a", text_weight=0.0)), wearing(base, use("a-unet")),
        wearing(base, use("a", weight=0.0, text_weight=0.6)), wearing(base, use("a-text", weight=0.6)),
    ]  # fmt: skip
    unet, only_unet, text, only_text = finished(serving, asked)
    assert apart(unet, only_unet) < CLOSE and apart(text, only_text) < CLOSE
    assert apart(unet, text) > 0.01


def test_a_weight_changes_at_its_steps_and_routes_are_made_then_only(
    serving: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving.engine.forward import Forward

    made: list[int] = []
    make = Forward.make.__func__  # type: ignore[attr-defined]

    def counted(*given: Any, **named: Any) -> Forward:
        made.append(1)
        forward: Forward = make(*given, **named)
        return forward

    monkeypatch.setattr(Forward, "make", classmethod(counted))
    spans = (WeightSpan(start=0, end=0.5, weight=1.0), WeightSpan(start=0.5, end=0.75, weight=-0.4))
    assert [weight_at(spans, step, 8) for step in range(8)] == [1, 1, 1, 1, -0.4, -0.4, 0, 0]
    asked = wearing(serving.base, use("a-unet", weight=1.0, schedule=spans), steps=8)
    (found,) = finished(serving, [asked])
    assert len(made) == 3
    job = serving.submit(wearing(serving.base, use("a-unet"), steps=8))
    (sample,) = job.samples
    while not job.over:
        by_hand = {4: -0.4, 6: 0.0}.get(sample.step)
        if by_hand is not None:
            job.request = wearing(serving.base, use("a-unet", weight=by_hand), steps=8)
        serving.step()
    assert sample.latents is not None
    assert apart(found, sample.latents[None]) < CLOSE
    (beside, _) = finished(serving, [asked, wearing(serving.base, use("b"), steps=5)])
    assert apart(beside, found) < CLOSE
