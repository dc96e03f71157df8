"""The pack: laws 2, 3 and 8, over the settings and not only the defaults."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from tests.tiny import clip, clip_tokenizer, ddpm
from tests.training.subjects import subject
from training.adapters.adapter import Adapter, LowRank
from training.base.base import Base
from training.base.names import canonical
from training.base.stream import shuffled, stream
from training.base.words import tokenise
from training.trainer.batch import Batch
from training.trainer.checkpoint import SubjectState, dump_state, load_state
from training.trainer.loop import train
from training.trainer.member import Member, StepReport, Subject
from training.trainer.pack import Pack, training_bank
from training.trainer.step import Sent, Step

TARGETS: dict[str, Sequence[str]] = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
TIGHT = 1e-5


class Outcome:
    """What a pack made of its subjects."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.states: dict[str, SubjectState] = {}
        self.reasons: dict[str, str | None] = {}
        self.reports: dict[str, list[StepReport]] = {}


def run(
    base: Base, subjects: Sequence[Subject], *, slots: int = 1, rank: int = 8, stop: int | None = None, **options: Any
) -> Outcome:
    """Trains subjects in one pack to their ends, or for `stop` fused steps."""
    usual = {**TARGETS, "text_encoder_2": TARGETS["text_encoder"], "transformer": base.facts.targets}
    targets = {component: usual[component] for component in base.facts.components}
    pack = Pack(base, training_bank(base, slots=slots, rank=rank, targets=targets, words=2), **options)
    todo, out = list(subjects), Outcome()

    def feed(count: int) -> list[Subject]:
        taken = todo[:count]
        del todo[:count]
        return taken

    for turn, progress in enumerate(train(pack, feed), start=1):
        for report in progress.reports:
            out.reports.setdefault(report.id, []).append(report)
        ended = [e.id for e in progress.ended if e.id in pack.ids]
        for id in pack.ids if turn == stop else ended:
            out.adapters[id], out.states[id] = pack.adapter(id), pack.state(id)
        out.reasons |= {e.id: e.reason for e in progress.ended}
        if turn == stop:
            break
    pack.close()
    return out


def distance(one: Adapter, other: Adapter) -> float:
    """Largest difference of any parameter."""
    assert one.modules.keys() == other.modules.keys()
    assert one.embeddings.keys() == other.embeddings.keys()
    pairs = [
        (part, twin) for key, low in one.modules.items() for part, twin in zip(low, other.modules[key], strict=True)
    ]
    pairs += [(vectors, other.embeddings[word]) for word, vectors in one.embeddings.items()]
    return max((part - twin).abs().max().item() for part, twin in pairs)


VARIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "longer": {"train": {"max_steps": 7}},
    "rank4": {"lora": {"rank": 4}},
    "alpha": {"lora": {"alpha": 16}},
    "no-text": {"lora": {"text_encoder": False}},
    "conv": {"lora": {"targets": ["to_q", "proj_in", "conv1"]}},
    "accumulate": {"train": {"gradient_accumulation_steps": 3, "batch_size": 2}},
    "no-prior": {"prior": {"enabled": False}},
    "prediction": {"prior": {"source": "prediction", "weight": 0.5}},
    "target": {"prior": {"target": "prediction"}},
    "prediction-captions": {"prior": {"source": "prediction", "captions": True}},
    "min-snr": {"train": {"min_snr_gamma": 5.0, "noise_offset": 0.1}},
    "cosine": {"train": {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_grad_norm": None}},
    "prodigy": {"train": {"optimizer": "prodigy", "learning_rate": 1.0}},
    "bucket": {"train": {"crop": "bucket", "batch_size": 3}},
    "word": {
        "words": {"tokens": ["<s1>", "<s2>"], "learning_rate": 1e-2},
        "instance_prompt": "a photo of <s1><s2> dog",
        "lora": {"text_encoder": False},
    },
    "word-and-text": {"words": {"tokens": ["<s1>"]}, "instance_prompt": "a photo of <s1>"},
}


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return [subject(id, seed=seed, **settings) for seed, (id, settings) in enumerate(VARIED.items())]


@pytest.fixture(scope="module")
def alone(tiny64: Base, subjects: list[Subject]) -> dict[str, Adapter]:
    return {s.spec.id: run(tiny64, [s]).adapters[s.spec.id] for s in subjects}


def test_a_subject_in_a_pack_equals_the_same_subject_alone(
    tiny64: Base, subjects: list[Subject], alone: dict[str, Adapter]
) -> None:
    """Law 2: five slots for all subjects, so they join and leave beside changing company."""
    packed = run(tiny64, subjects, slots=5).adapters
    assert packed.keys() == alone.keys()
    for id, adapter in packed.items():
        assert distance(adapter, alone[id]) <= TIGHT, id
        assert max(low.up.abs().max().item() for low in adapter.modules.values()) > 0, id


def test_the_packs_order_changes_nothing(tiny64: Base, subjects: list[Subject], alone: dict[str, Adapter]) -> None:
    packed = run(tiny64, subjects[::-1], slots=len(subjects)).adapters
    assert all(distance(adapter, alone[id]) <= TIGHT for id, adapter in packed.items())


def test_gradient_checkpointing_changes_nothing_and_trains_the_text_encoder(
    tiny64: Base, subjects: list[Subject], alone: dict[str, Adapter]
) -> None:
    checkpointed = run(tiny64, subjects[:3], slots=3, gradient_checkpointing=True).adapters
    for id, adapter in checkpointed.items():
        assert distance(adapter, alone[id]) <= TIGHT
        text = [low.up.abs().max().item() for key, low in adapter.modules.items() if key.startswith("text_encoder")]
        assert text and min(text) > 0


def test_resume_in_the_same_company_is_bit_exact(tiny: Base) -> None:
    """Law 3, in fp32: every subject is stopped at step 2, written, read and goes on."""
    subjects = [subject("a", seed=1), subject("b", seed=2, train={"max_steps": 6}), subject("c", seed=3)]
    through = run(tiny, subjects, slots=3)
    stopped = run(tiny, subjects, slots=3, stop=2)
    resumed = [
        Subject(s.spec, s.instance, s.prior, load_state(dump_state(stopped.states[s.spec.id]))) for s in subjects
    ]
    again = run(tiny, resumed, slots=3)
    for id, adapter in through.adapters.items():
        assert distance(adapter, again.adapters[id]) == 0
        assert dump_state(through.states[id]) == dump_state(again.states[id])


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_resume_in_another_pack_slot_and_company(tiny64: Base, optimizer: str) -> None:
    settings: dict[str, Any] = {"train": {"max_steps": 6, "optimizer": optimizer}, "lora": {"rank": 4}}
    one = subject("one", seed=1, **settings)
    through = run(tiny64, [one])
    stopped = run(tiny64, [subject("x", seed=9), one], slots=2, stop=3)
    state = load_state(dump_state(stopped.states["one"]))
    resumed = Subject(one.spec, one.instance, one.prior, state)
    again = run(tiny64, [subject("y", seed=8), subject("z", seed=7), resumed], slots=3, rank=16)
    assert distance(through.adapters["one"], again.adapters["one"]) <= TIGHT


def test_accumulation_accumulates_and_max_steps_means_optimizer_steps(tiny64: Base) -> None:
    out = run(tiny64, [subject("a", train={"gradient_accumulation_steps": 4, "max_steps": 3})])
    assert [report.step for report in out.reports["a"]] == [1, 2, 3]
    assert out.states["a"].history.shape == (3, 6)


@pytest.mark.parametrize("settings", [{}, {"train": {"gradient_accumulation_steps": 3, "batch_size": 2}}])
def test_the_fused_step_equals_a_plain_loop_with_peft_and_torch(tiny64: Base, settings: dict[str, Any]) -> None:
    """An independent trainer of one subject: PEFT's layers, torch's AdamW and clipping, autograd over everything."""
    one = subject("one", seed=3, **settings, prior={"enabled": False})
    ours = run(tiny64, [one]).adapters["one"]
    assert distance(ours, plain_loop(tiny64, one)) <= TIGHT


def plain_loop(base: Base, one: Subject) -> Adapter:
    """What the usual script does, on the draws that the subject's seed stands for."""
    spec = one.spec.train
    unet, text = copy.deepcopy(base.denoiser), copy.deepcopy(clip(base))
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=list(one.spec.lora.targets)), unet)
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=list(TARGETS["text_encoder"])), text)
    layers = {("unet", n): p for n, p in unet.named_parameters() if "lora" in n}
    layers |= {("text_encoder", n): p for n, p in text.named_parameters() if "lora" in n}
    for (component, name), parameter in layers.items():
        key = canonical(component, name.split(".lora_")[0])
        if "lora_A" in name:
            draw = torch.randn(parameter.shape, generator=stream(spec.seed, "init", key)) / 8
            parameter.data.copy_(draw)
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for (c, _), p in layers.items() if c == "unet"], "lr": spec.learning_rate},
            {"params": [p for (c, _), p in layers.items() if c != "unet"], "lr": spec.text_encoder_learning_rate},
        ],
        weight_decay=spec.adam_weight_decay,
    )
    prompts = [one.spec.filled_instance_prompt] * spec.batch_size
    tokens = tokenise(clip_tokenizer(base), prompts, [{}] * spec.batch_size).ids
    schedule = DDPMScheduler.from_config(ddpm(base).config)
    for step in range(spec.max_steps):
        for micro in range(spec.gradient_accumulation_steps):
            generator = stream(spec.seed, "instance", step, micro)
            start = (step * spec.gradient_accumulation_steps + micro) * spec.batch_size
            clean = torch.stack(
                one.instance.draw(shuffled(spec.seed, "instance", 5, start, spec.batch_size), generator)
            )
            noise = torch.stack([torch.randn(image.shape, generator=generator) for image in clean])
            clean, noise = clean.double(), noise.double()
            timesteps = torch.randint(0, 1000, (spec.batch_size,), generator=generator)
            noisy = schedule.add_noise(clean, noise, timesteps)
            goal = noise if ddpm(base).prediction_type == "epsilon" else schedule.get_velocity(clean, noise, timesteps)
            prediction = unet(noisy, timesteps, encoder_hidden_states=text(tokens)[0]).sample
            loss = torch.nn.functional.mse_loss(prediction, goal) / spec.gradient_accumulation_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.values(), spec.max_grad_norm or 1.0)
        optimizer.step()
        optimizer.zero_grad()
    modules = {}
    for (component, name), parameter in layers.items():
        if "lora_A" in name:
            up = layers[component, name.replace("lora_A", "lora_B")]
            key = canonical(component, name.split(".lora_")[0])
            modules[key] = LowRank(parameter.detach(), up.detach())
    return Adapter(modules=modules)


def with_room_for(
    rows: int, monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError] = torch.OutOfMemoryError, words: str = ""
) -> list[int]:
    """A device that has memory for so many rows at once; returns how many went through each forward."""
    run_step, seen = Step.run, list[int]()

    def limited(step: Step, batch: Batch, members: Sequence[Member], sent: Sent, *, last: bool) -> Tensor:
        if len(batch.member) > rows:
            raise error(words)
        seen.append(len(batch.member))
        return run_step(step, batch, members, sent, last=last)

    monkeypatch.setattr(Step, "run", limited)
    return seen


def test_out_of_memory_halves_the_pack_and_then_a_subjects_rows(tiny64: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 2 holds: rows that go through in turn have the whole's draws, and their gradients add up to the whole's."""
    todo = [subject("a", seed=1), subject("b", seed=2, train={"batch_size": 3, "gradient_accumulation_steps": 2})]
    alone = {one.spec.id: run(tiny64, [one]).adapters[one.spec.id] for one in todo}
    seen = with_room_for(4, monkeypatch)
    found = run(tiny64, todo, slots=2)
    assert found.reasons == {"a": None, "b": None}
    assert max(seen) == 3  # of six rows at once, after eight did not fit
    for id, adapter in alone.items():
        assert distance(found.adapters[id], adapter) < TIGHT


def test_a_subject_whose_row_does_not_fit_fails_and_the_next_one_goes_on(
    tiny64: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what oneDNN says where the kernel gives it no memory
    with_room_for(0, monkeypatch, RuntimeError, "could not create a primitive")
    found = run(tiny64, [subject("a"), subject("b")], slots=2)
    assert all(reason and "one row" in reason for reason in found.reasons.values()) and len(found.reasons) == 2


def test_a_diverging_subject_fails_with_its_step_and_costs_the_others_nothing(tiny64: Base) -> None:
    """Law 8: NaN in one subject's latents from the start."""
    bad = subject("bad", seed=5)
    for image in bad.instance.images:
        image.mean_CHW.fill_(float("nan"))
    good = [subject("a", seed=1), subject("b", seed=2)]
    out = run(tiny64, [good[0], bad, good[1]], slots=3)
    reason = out.reasons["bad"]
    assert reason is not None and "step 1" in reason and "learning_rate" in reason
    for s in good:
        assert out.reasons[s.spec.id] is None
        assert distance(out.adapters[s.spec.id], run(tiny64, [s]).adapters[s.spec.id]) <= TIGHT


def test_a_pack_that_does_not_fit_is_halved_and_loses_nothing(tiny64: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [subject(id, seed=seed) for seed, id in enumerate("abcd")]
    step = Pack.step

    def too_small(pack: Pack) -> list[StepReport]:
        if len(pack.ids) > 2:
            raise torch.OutOfMemoryError("planted")
        return step(pack)

    monkeypatch.setattr(Pack, "step", too_small)
    out = run(tiny64, subjects, slots=4)
    monkeypatch.undo()
    assert set(out.adapters) == set("abcd")
    for s in subjects:
        assert distance(out.adapters[s.spec.id], run(tiny64, [s]).adapters[s.spec.id]) <= TIGHT


def test_the_base_is_untouched_by_training(tiny64: Base) -> None:
    before = {name: tensor.clone() for name, tensor in tiny64.denoiser.state_dict().items()}
    run(tiny64, [subject("a")])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny64.denoiser.state_dict().items())
    assert all(not module._forward_hooks for module in tiny64.denoiser.modules())


def test_prior_weight_zero_equals_no_prior_at_all(tiny64: Base) -> None:
    without = run(tiny64, [subject("a", prior={"enabled": False})]).adapters["a"]
    weightless = run(tiny64, [subject("a", prior={"weight": 0.0})]).adapters["a"]
    assert distance(without, weightless) <= TIGHT
    with_prior = run(tiny64, [subject("a")]).adapters["a"]
    assert distance(without, with_prior) > 1e-4


@pytest.mark.parametrize("prior", [{"target": "prediction"}, {"source": "prediction"}])
def test_the_base_as_the_target_pulls_on_nothing_until_the_class_drifts(tiny64: Base, prior: dict[str, Any]) -> None:
    pack = Pack(tiny64, training_bank(tiny64, slots=1, rank=8, targets=TARGETS))
    pack.join(subject("a", prior=prior, train={"learning_rate": 1e-2}))
    first, second = (pack.step()[0] for _ in range(2))
    pack.close()
    assert first.prior_loss < 1e-20 < first.instance_loss and second.prior_loss > 1e-12
