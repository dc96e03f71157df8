"""Every size of an engine can be set on the command line of both servers, from one list of fields."""

from collections.abc import Callable
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import ray_app.serve.deployments
import serving.__main__
from ray_app.cli.main import main
from ray_app.cli.server import serve
from ray_app.cli.up import up
from serving.config import EngineSpec, ServeSpec
from serving.engine.tiers.fit import check_fit
from tests.serving.company import random_adapter
from training.adapters.adapter import Adapter, AdapterError
from training.base.base import Base
from training.errors import UserError

EMBEDDINGS = torch.ones(9, 32)
GIVEN: dict[str, tuple[str, Any]] = {
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("bf16", "bf16"),
    "base_quantization": ("int8", "int8"),
    "base_offload": ("layers", "layers"),
    "targets": ("to_q, ff.net.2", ("to_q", "ff.net.2")),
    "text_encoder_targets": ("fc1", ("fc1",)),
    "fixed_rows": ("", True),
}


@pytest.fixture(params=["dreamfleet serve", "python -m serving"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineSpec]:
    """Runs the command line as far as the server's start, and returns the engine that it would start."""
    seen: list[ServeSpec] = []

    def start(*arguments: str) -> EngineSpec:
        ours = request.param == "dreamfleet serve"
        command = main if ours else serving.__main__.main
        result = CliRunner().invoke(command, ["serve", *arguments] if ours else arguments)
        if isinstance(result.exception, UserError):
            raise result.exception
        if not seen:
            raise UserError(result.output)
        return seen.pop().engine

    def stop(spec: ServeSpec) -> None:
        seen.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(serving.__main__, "make_engine", stop)
    monkeypatch.setattr(ray_app.serve.deployments, "serve_forever", lambda **given: stop(given["deployment"].server))
    return start


def test_each_size_has_a_flag(started: Callable[..., EngineSpec]) -> None:
    assert started() == EngineSpec()
    for name in EngineSpec.model_fields:
        written, value = GIVEN.get(name, ("7", 7))
        arguments = [f"--{name.replace('_', '-')}", *([written] if written else [])]
        assert started(*arguments) == EngineSpec.model_validate({name: value}), name


def test_each_default_of_a_request_has_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--cors", "https://a.example,https://b.example", "--steps", "7", "--guidance-scale", "2", "--scheduler"]
    seen: list[ServeSpec] = []
    monkeypatch.setattr(
        ray_app.serve.deployments, "serve_forever", lambda **given: seen.append(given["deployment"].server)
    )
    result = CliRunner().invoke(main, ["serve", *given, "euler", "--no-picture-parameters", "--refresh-s", "2"])
    assert result.exit_code == 0, result.output
    assert seen == [
        ServeSpec(
            cors=("https://a.example", "https://b.example"),
            steps=7,
            guidance_scale=2.0,
            scheduler="euler",
            picture_parameters=False,
            refresh_s=2.0,
        )
    ]


def test_a_flag_may_come_from_the_environment(
    started: Callable[..., EngineSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DREAMFLEET_RANK", "64")
    assert started().rank == 64 and started("--rank", "16").rank == 16


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rank", "2000"], ["--rank", "1<=x<=1024"]),
        (["--dtype", "fp8"], ["--dtype", "bf16"]),
        (["--device", "tpu"], ["--device is 'tpu'", "cuda"]),
    ],
)
def test_a_bad_value_names_its_flag_and_what_is_allowed(
    started: Callable[..., EngineSpec], arguments: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        started(*arguments)
    assert all(part in str(refused.value) for part in parts)


def test_help_says_every_fields_meaning() -> None:
    for command in (serve, serving.__main__.main, up):
        said = {option.name: option.help for option in command.params if isinstance(option, click.Option)}
        assert all(said[name] == field.description for name, field in EngineSpec.model_fields.items())


def test_what_a_server_does_not_take_names_the_flag_that_would(tiny: Base) -> None:
    high, layers = random_adapter(tiny, 1, rank=40), EngineSpec(targets=("to_q",))
    worded = Adapter({}, {"<s1>": EMBEDDINGS[:1], "<s2>": EMBEDDINGS})
    for adapter, spec, message, enough in (
        (high, EngineSpec(), "--rank 40", EngineSpec(rank=40)),
        (high, EngineSpec(), "adapters resize ADAPTER --rank 32", EngineSpec(rank=40)),
        (worded, EngineSpec(), "--words 10", EngineSpec(words=10)),
        (random_adapter(tiny, 1), layers, "--targets", EngineSpec()),
    ):
        with pytest.raises(AdapterError, match=message):
            check_fit(adapter, spec, tiny.facts)
        check_fit(adapter, enough, tiny.facts)
