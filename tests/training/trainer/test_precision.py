"""Precisions and objectives: bf16, fp16 with a loss scale per subject, v-prediction, min-SNR, loss formulas."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from tests.tiny import ddpm, tiny_base
from tests.training.subjects import subject
from tests.training.trainer.test_pack import distance, plain_loop, run
from training.base.base import Base, load_base
from training.base.noise.ddpm import Ddpm
from training.errors import UserError
from training.trainer.fitting import precision
from training.trainer.member import FP16_SCALE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny_base(root, kind) for kind in ("epsilon", "v_prediction")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_precisions_learn_about_the_same(folders: dict[str, Path], tiny: Base, dtype: torch.dtype) -> None:
    """Master weights stay in fp32, so the adapter is fp32 and close to the one that was trained in fp32."""
    narrow = load_base(str(folders["epsilon"]), device="cpu", dtype=dtype)
    one = subject("a", seed=1, train={"max_steps": 6, "adam_epsilon": 1e-4})
    wide, close = run(tiny, [one]), run(narrow, [one])
    assert all(part.dtype == torch.float32 for low in close.adapters["a"].modules.values() for part in low)
    assert 0 < distance(wide.adapters["a"], close.adapters["a"]) < 0.05
    losses = [(a.loss, b.loss) for a, b in zip(wide.reports["a"], close.reports["a"], strict=True)]
    assert all(math.isclose(a, b, rel_tol=0.05) for a, b in losses)


def test_fp16_scales_each_subjects_loss_for_itself(folders: dict[str, Path]) -> None:
    """A subject whose gradients overflow repeats its step at half the scale; its neighbour does not notice."""
    narrow = load_base(str(folders["epsilon"]), device="cpu", dtype=torch.float16)
    loud = subject("loud", seed=1, train={"max_steps": 2}, prior={"weight": 100.0})  # overflows at the first scale
    calm = subject("calm", seed=2, train={"max_steps": 2})
    both = run(narrow, [loud, calm], slots=2)
    assert both.reasons == {"loud": None, "calm": None}
    assert both.states["loud"].loss_scale < FP16_SCALE
    assert both.states["calm"].loss_scale == run(narrow, [calm]).states["calm"].loss_scale
    assert [report.step for report in both.reports["loud"]] == [1, 2]
    assert both.states["loud"].history[:, 0].tolist() == [1, 2]


def test_an_overflow_in_the_last_step_costs_no_step(folders: dict[str, Path]) -> None:
    """`max_steps` are optimizer steps that were done; one that is repeated has not been."""
    narrow = load_base(str(folders["epsilon"]), device="cpu", dtype=torch.float16)
    loud = subject("loud", seed=1, train={"max_steps": 1}, prior={"weight": 100.0})
    state = run(narrow, [loud]).states["loud"]
    assert state.loss_scale < FP16_SCALE
    assert (state.step, state.history.shape[0]) == (1, 1)


def test_v_prediction_equals_a_plain_loop(folders: dict[str, Path]) -> None:
    base = load_base(str(folders["v_prediction"]), device="cpu", dtype=torch.float64)
    one = subject("one", seed=3, prior={"enabled": False})
    assert distance(run(base, [one]).adapters["one"], plain_loop(base, one)) <= 1e-5


def test_targets_are_those_of_diffusers(tiny: Base) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    scheduler = DDPMScheduler.from_config(ddpm(tiny).config)
    levels = tiny.process.levels(timesteps.tolist(), torch.float64)
    assert torch.allclose(levels.noisy(latents, noise), scheduler.add_noise(latents, noise, timesteps), atol=1e-6)
    assert torch.equal(levels.target(latents, noise), noise)
    config = {**ddpm(tiny).config, "prediction_type": "v_prediction"}
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    found = Ddpm(config).levels(timesteps.tolist(), torch.float64).target(latents, noise)
    assert torch.allclose(found, velocity, atol=1e-6)
    with pytest.raises(UserError, match="sample"):
        Ddpm({**config, "prediction_type": "sample"})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(tiny: Base, kind: str) -> None:
    timesteps = torch.arange(0, 1000, 37)
    process = Ddpm({**ddpm(tiny).config, "prediction_type": kind})
    found_snr = process.levels(timesteps.tolist(), torch.float64).snr_N
    snr = compute_snr(DDPMScheduler.from_config(ddpm(tiny).config), timesteps).double()
    expected = snr.clamp(max=5.0) / (snr + 1 if kind == "v_prediction" else snr)
    found = process.snr_weights(found_snr, torch.full_like(found_snr, 5.0))
    assert torch.allclose(found, expected, rtol=1e-4)
    assert (process.snr_weights(found_snr, torch.full_like(found_snr, math.inf)) == 1).all()


def test_min_snr_is_finite_where_the_schedule_ends_in_pure_noise(tiny: Base) -> None:
    weights = tiny.process.snr_weights(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 5.0]))
    assert weights.isfinite().all()


def test_what_auto_precision_means() -> None:
    cpu = torch.device("cpu")
    assert precision("no", cpu) == torch.float32
    assert precision("fp16", cpu) == torch.float16
    assert precision("auto", cpu) in (torch.float32, torch.bfloat16)
