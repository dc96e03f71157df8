"""Other programs read what we export and we read what they write; every round trip is lossless (law 5)."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from tests.tiny import tiny_pipeline
from tests.training.adapters.test_adapter import add_deltas, assert_equal, draw, random_adapter, shapes_of, weights_of
from training.adapters.adapter import Adapter, AdapterError, LowRank, load_adapter, save_adapter
from training.adapters.formats.formats import (
    Format,
    Label,
    export_adapter,
    import_adapter,
    label_of,
    recognise,
)
from training.adapters.formats.lora_diffusion import text_encoder_order, unet_order
from training.adapters.merge import merge_adapters, reduce_rank
from training.adapters.tensor_file import read_tensors, write_tensors
from training.base.families import open_family
from training.base.names import canonical

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
WIDE = (*ATTENTION, *CLIP, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj", "conv1", "fc1", "fc2")

# The key rules of AUTOMATIC1111 (extensions-builtin/Lora) and ComfyUI (comfy/lora.py, comfy/weight_adapter/lora.py) as
# data. A1111 and ComfyUI look a kohya name up among the base's names, made with the same underscores.
KOHYA_UNET = (
    r"lora_unet_(down_blocks_\d+|up_blocks_\d+|mid_block)_"
    r"(attentions_\d+_(proj_in|proj_out|transformer_blocks_\d+_(attn[12]_(to_q|to_k|to_v|to_out_0)|ff_net_(0_proj|2)))"
    r"|resnets_\d+_(conv1|conv2|time_emb_proj|conv_shortcut))"
)
KOHYA_TEXT = r"lora_te_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
KOHYA_SUFFIXES = {"lora_down.weight", "lora_up.weight", "alpha"}
COMFY_DIFFUSERS = r"(unet\..+\.lora|text_encoder\.text_model\.encoder\.layers\.\d+\..+\.lora_linear_layer)"
KOHYA_METADATA = {  # sd-scripts' minimum, and what indexers and user interfaces show
    "ss_v2": "False",
    "ss_base_model_version": "sd_v1",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "3",
    "ss_network_alpha": "3.0",
    "ss_output_name": "rusty",
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.title": "rusty",
    "modelspec.resolution": "512x512",
    "modelspec.trigger_phrase": "sks dog",
}


@pytest.fixture
def pipeline(tmp_path: Path) -> StableDiffusionPipeline:
    return tiny_pipeline(tmp_path)


@pytest.fixture
def modules(pipeline: StableDiffusionPipeline) -> frozenset[str]:
    return frozenset(weights_of(pipeline))


def full(pipeline: StableDiffusionPipeline, targets: tuple[str, ...] = ATTENTION + CLIP) -> Adapter:
    adapter = random_adapter(shapes_of(pipeline, targets))
    tokens = {"<s1>": torch.arange(32.0), "<s-1>": torch.ones(2, 32)}
    return Adapter(adapter.modules, tokens, {"trigger": "sks dog", "base": "pocket"})


def as_peft(adapter: Adapter, component: str, scale: float = 1.0) -> dict[str, torch.Tensor]:
    made = {}
    for name, low in adapter.modules.items():
        if name.startswith(f"{component}."):
            path = name.removeprefix(f"{component}.")
            made[f"base_model.model.{path}.lora_A.weight"] = low.down
            made[f"base_model.model.{path}.lora_B.weight"] = low.up / scale
    return made


@pytest.mark.parametrize("format", ["diffusers", "kohya", "lora_diffusion", "peft"])
def test_round_trips_are_lossless(pipeline: StableDiffusionPipeline, modules: frozenset[str], format: Format) -> None:
    for targets in (ATTENTION + CLIP, ATTENTION, CLIP, (*ATTENTION, "ff.net.0.proj")):
        adapter = full(pipeline, targets)
        files = export_adapter(adapter, format, modules)
        assert recognise(files)[0] in (format, "embedding")
        assert_equal(import_adapter(files, modules), adapter)
        assert files == export_adapter(import_adapter(files, modules), format, modules)
        assert save_adapter(import_adapter(files, modules)) == save_adapter(adapter)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_every_target_survives(pipeline: StableDiffusionPipeline, modules: frozenset[str], format: Format) -> None:
    adapter = full(pipeline, WIDE)
    assert_equal(import_adapter(export_adapter(adapter, format), modules), adapter)


def test_kohya_keys_and_metadata_are_what_its_readers_look_for(pipeline: StableDiffusionPipeline) -> None:
    files = export_adapter(full(pipeline, WIDE), "kohya", label=Label(name="rusty"))
    assert list(files) == ["rusty.safetensors", "embeddings/s1.safetensors", "embeddings/s-1.safetensors"]
    tensors, metadata = read_tensors(files["rusty.safetensors"])
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        assert re.fullmatch(KOHYA_UNET, name) or re.fullmatch(KOHYA_TEXT, name), key
        assert suffix in KOHYA_SUFFIXES and tensor.dtype == torch.float16
        assert {f"{name}.{suffix}" for suffix in KOHYA_SUFFIXES} <= tensors.keys()
        if suffix == "alpha":
            assert tensor.shape == () and tensor.item() == tensors[f"{name}.lora_down.weight"].shape[0]
    assert metadata.items() >= KOHYA_METADATA.items()
    assert json.loads(metadata["ss_tag_frequency"]) == {"rusty": {"sks dog": 1}}
    assert all(len(read_tensors(files[name]).tensors) == 1 for name in files if name.startswith("embeddings/"))


@pytest.mark.parametrize(
    ("width", "prediction", "version", "architecture"),
    [
        (768, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        (768, "v_prediction", "sd_v1_v", "stable-diffusion-v1/lora"),
        (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        (1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_a_kohya_file_is_labelled_with_its_base(
    pipeline: StableDiffusionPipeline, tmp_path: Path, width: int, prediction: str, version: str, architecture: str
) -> None:
    pipeline.save_pretrained(tmp_path / "base")
    for name, changes in (
        ("unet/config.json", {"cross_attention_dim": width, "sample_size": 384}),
        ("text_encoder/config.json", {"hidden_size": width}),
        ("scheduler/scheduler_config.json", {"prediction_type": prediction}),
    ):
        file = tmp_path / "base" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    label = label_of("rusty", open_family(tmp_path / "base", "x").facts)
    files = export_adapter(full(pipeline), "kohya", label=label)
    metadata = read_tensors(files["rusty.safetensors"]).metadata
    assert metadata["ss_base_model_version"] == version and metadata["modelspec.architecture"] == architecture
    assert metadata["ss_v2"] == str(width == 1024) and metadata["modelspec.resolution"] == "768x768"
    assert metadata["modelspec.prediction_type"] == ("v" if prediction == "v_prediction" else "epsilon")


def test_diffusers_own_kohya_conversion_is_read(pipeline: StableDiffusionPipeline, modules: frozenset[str]) -> None:
    """It writes alphas as int64."""
    adapter = random_adapter(shapes_of(pipeline, ATTENTION))
    layers = {}
    for name, low in adapter.modules.items():
        layers[f"{name}.lora_A.weight"], layers[f"{name}.lora_B.weight"] = low.down, low.up
    kohya = convert_state_dict_to_kohya(layers)
    assert {tensor.dtype for key, tensor in kohya.items() if key.endswith("alpha")} == {torch.int64}
    data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in kohya.items()})
    assert_equal(import_adapter({"a.safetensors": data}, modules), adapter)


def test_comfyui_also_reads_the_canonical_file(pipeline: StableDiffusionPipeline) -> None:
    adapter = random_adapter(shapes_of(pipeline, WIDE))
    for key in read_tensors(save_adapter(adapter)).tensors:
        assert re.fullmatch(COMFY_DIFFUSERS + r"\.(down|up)\.weight", key), key


@pytest.mark.parametrize("targets", [ATTENTION + CLIP, (*ATTENTION, *CLIP, "ff.net.0.proj", "proj_in", "fc1")])
def test_diffusers_reads_the_kohya_export_and_draws_our_image(
    pipeline: StableDiffusionPipeline, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    adapter = random_adapter(shapes_of(pipeline, targets))
    (tmp_path / "kohya.safetensors").write_bytes(export_adapter(adapter, "kohya")["adapter.safetensors"])
    pipeline.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    ours = tiny_pipeline(tmp_path)
    add_deltas(ours, adapter)
    assert (draw(ours) - draw(pipeline)).abs().max() <= 1e-4


def test_diffusers_reads_the_token_file(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    files = export_adapter(full(pipeline), "diffusers")
    (tmp_path / "s1.safetensors").write_bytes(files["embeddings/s1.safetensors"])
    pipeline.load_textual_inversion(tmp_path, weight_name="s1.safetensors")
    index = pipeline.tokenizer.convert_tokens_to_ids("<s1>")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[index], torch.arange(32.0))


def test_what_diffusers_saves_is_read_with_its_alpha(
    pipeline: StableDiffusionPipeline, modules: frozenset[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pipeline.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=[*ATTENTION, "proj_in"], init_lora_weights=False)
    )
    pipeline.text_encoder.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(CLIP), init_lora_weights=False))
    plain = draw(tiny_pipeline(tmp_path))
    wanted = draw(pipeline)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipeline.text_encoder.peft_config["default"].to_dict(),
    )
    files = {"theirs.safetensors": (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()}
    adapter = import_adapter(files, modules)
    ours = tiny_pipeline(tmp_path)
    add_deltas(ours, adapter)
    assert (draw(ours) - wanted).abs().max() <= 1e-4 < (plain - wanted).abs().max()


def test_a_peft_folder_is_read_with_its_settings(pipeline: StableDiffusionPipeline, modules: frozenset[str]) -> None:
    adapter = random_adapter(shapes_of(pipeline, ATTENTION + CLIP))
    files = {}
    for component, settings, scale in (
        ("unet", {"r": 2, "lora_alpha": 4, "rank_pattern": {}}, 2.0),
        ("text_encoder", {"r": 2, "lora_alpha": 3, "use_rslora": True}, 1.0),
    ):
        tensors = as_peft(adapter, component, scale)
        if component == "text_encoder":
            tensors = {key.replace("text_model.", ""): tensor for key, tensor in tensors.items()}
        files[f"{component}/adapter_model.safetensors"] = write_tensors(tensors, {})
        files[f"{component}/adapter_config.json"] = json.dumps(
            {"peft_type": "LORA", "bias": "none"} | settings
        ).encode()
    read = import_adapter(files, modules)
    assert recognise(files) == ("peft",) and read.modules.keys() == adapter.modules.keys()
    for name, low in adapter.modules.items():
        factor = 4 / low.rank / 2 if name.startswith("unet") else 3 / low.rank**0.5
        torch.testing.assert_close(read.modules[name].delta(), low.delta() * factor)


@pytest.mark.parametrize("targets", [ATTENTION, (*ATTENTION, "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")])
def test_peft_reads_the_peft_export_on_the_denoiser(
    pipeline: StableDiffusionPipeline, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """`from_pretrained` and `load_adapter`: each adapter's own deltas, ranks that differ from layer to layer."""
    adapters = [random_adapter(shapes_of(pipeline, (*targets, *CLIP)), seed=seed) for seed in (1, 2)]
    assert len({low.rank for low in adapters[0].modules.values()}) > 1
    for number, adapter in enumerate(adapters):
        for name, data in export_adapter(adapter, "peft").items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    for component, inputs in (
        ("unet", (torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 4, 32))),
        ("text_encoder", (torch.tensor([[1, 2, 3]]),)),
    ):
        theirs = PeftModel.from_pretrained(getattr(pipeline, component), str(tmp_path / "0" / component))
        theirs.load_adapter(str(tmp_path / "1" / component), "second")
        for number, called in enumerate(("default", "second")):
            theirs.set_adapter(called)
            ours = tiny_pipeline(tmp_path)
            add_deltas(ours, adapters[number])
            with torch.no_grad():
                difference = theirs(*inputs)[0] - getattr(ours, component)(*inputs)[0]
            assert difference.abs().max() <= 1e-5


def test_what_peft_saves_is_read_with_its_patterns(
    pipeline: StableDiffusionPipeline, modules: frozenset[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    first = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=list(ATTENTION),
        rank_pattern={first: 4, "attn2.to_k": 3},
        alpha_pattern={first: 5, "to_v": 1},
        use_rslora=True,
        init_lora_weights=False,
    )
    theirs = PeftModel(pipeline.unet, config)
    theirs.save_pretrained(str(tmp_path / "unet"))
    files = {f"unet/{path.name}": path.read_bytes() for path in (tmp_path / "unet").iterdir()}
    ours = tiny_pipeline(tmp_path)
    add_deltas(ours, import_adapter(files, modules))
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 4, 32)
    with torch.no_grad():
        wanted, plain = theirs(*inputs)[0], tiny_pipeline(tmp_path).unet(*inputs)[0]
        assert (ours.unet(*inputs)[0] - wanted).abs().max() <= 1e-5 < (plain - wanted).abs().max()


def test_patterns_of_peft_settings_are_names_not_programs(modules: frozenset[str]) -> None:
    name = next(name for name in sorted(modules) if name.endswith("attn1.to_q"))
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}

    def scale(patterns: dict[str, float]) -> float:
        settings = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": patterns}
        data = write_tensors(tensors, {"lora_adapter_metadata": json.dumps(settings)})
        return import_adapter({"a.safetensors": data}, modules).modules[name].up[0, 0].item()

    assert scale({}) == 1 and scale({"attn1.to_q": 6.0}) == 3 and scale({"^attn1.to_q": 6.0}) == 1
    assert scale({f"^{name.removeprefix('unet.')}": 4.0}) == 2
    with pytest.raises(AdapterError, match="alpha_pattern"):
        scale({"(a+)+$": 6.0})


def test_files_of_older_diffusers_are_read(pipeline: StableDiffusionPipeline, modules: frozenset[str]) -> None:
    adapter = random_adapter(shapes_of(pipeline, ATTENTION))
    for prefix in ("", "unet."):
        tensors = {}
        for name, low in adapter.modules.items():
            path, _, leaf = name.removeprefix("unet.").replace("to_out.0", "to_out").rpartition(".")
            tensors[f"{prefix}{path}.processor.{leaf}_lora.down.weight"] = low.down
            tensors[f"{prefix}{path}.processor.{leaf}_lora.up.weight"] = low.up
        files = {"old.safetensors": write_tensors(tensors, {})}
        assert recognise(files) == ("diffusers_old",)
        assert_equal(import_adapter(files, modules), adapter)


def test_old_text_encoder_keys_and_alphas_are_read(modules: frozenset[str]) -> None:
    stem = "text_encoder.text_model.encoder.layers.0.self_attn"
    low = LowRank(torch.ones(2, 32), torch.ones(32, 2))
    tensors = {
        f"{stem}.to_out_lora.down.weight": low.down,
        f"{stem}.to_out_lora.up.weight": low.up,
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha": torch.tensor(1.0),
    }
    with pytest.raises(AdapterError, match="no known|fit no module"):
        import_adapter({"mixed.safetensors": write_tensors(tensors, {})}, modules)
    tensors.popitem()
    read = import_adapter({"old.safetensors": write_tensors(tensors, {})}, modules)
    assert list(read.modules) == [f"{stem}.out_proj"]
    kohya = {
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_down.weight": torch.ones(2, 32),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_up.weight": torch.ones(37, 2),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha": torch.tensor(1.0),
    }
    read = import_adapter({"kohya.safetensors": write_tensors(kohya, {})}, modules)
    assert read.modules["text_encoder.text_model.encoder.layers.1.mlp.fc1"].up[0, 0] == 0.5


def sd15_modules() -> list[str]:
    """The attention and GEGLU modules of SD 1.5 by today's names, in no particular order."""
    blocks = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    blocks += ["mid_block.attentions.0"] + [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    leaves = [f"{attention}.{leaf}" for attention in ("attn1", "attn2") for leaf in ATTENTION]
    unet = [f"unet.{b}.transformer_blocks.0.{leaf}" for b in blocks for leaf in (*leaves, "ff.net.0.proj", "ff.net.2")]
    stem = "text_encoder.text_model.encoder.layers"
    return sorted(unet) + [f"{stem}.{i}.self_attn.{leaf}" for i in range(12) for leaf in CLIP]


def test_the_positions_of_lora_diffusion_are_those_of_its_own_files() -> None:
    """Facts of published files of that package: 144 + 48 modules, GEGLU between the attentions, middle block last."""
    order, text = unet_order(sd15_modules(), wide=True, then=True), text_encoder_order(sd15_modules())
    assert (len(order), len(unet_order(sd15_modules(), wide=False)), len(text)) == (144, 128, 48)
    first, stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0", "text_encoder.text_model.encoder.layers"
    assert order[:5] == [f"{first}.attn1.{leaf}" for leaf in ATTENTION] + [f"{first}.ff.net.0.proj"]
    assert order[5:9] == [f"{first}.attn2.{leaf}" for leaf in ATTENTION]
    assert order[54].startswith("unet.up_blocks.1.") and order[-1].startswith("unet.mid_block.")
    assert text[:4] == [f"{stem}.0.self_attn.{leaf}" for leaf in ("k_proj", "v_proj", "q_proj", "out_proj")]
    assert text[-1] == f"{stem}.11.self_attn.out_proj"


def linears_below(model: torch.nn.Module, classes: set[str]) -> list[str]:
    """The order in which the lora_diffusion package walks a model: every linear layer below a module of `classes`."""
    found = []
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            found += [f"{name}.{leaf}" for leaf, below in module.named_modules() if isinstance(below, torch.nn.Linear)]
    return found


def test_lora_diffusion_files_are_written_in_the_order_of_todays_models(
    pipeline: StableDiffusionPipeline, modules: frozenset[str]
) -> None:
    walked = linears_below(pipeline.unet, {"Attention", "CrossAttention", "GEGLU"})
    assert [f"unet.{name}" for name in walked] == unet_order(modules, wide=True)
    walked = linears_below(pipeline.text_encoder, {"CLIPAttention"})
    assert [canonical("text_encoder", name) for name in walked] == text_encoder_order(modules)


@pytest.mark.parametrize("then", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_the_geglu_shapes_tell_the_two_orders_of_lora_diffusion(
    pipeline: StableDiffusionPipeline, modules: frozenset[str], then: bool, told: bool
) -> None:
    adapter = random_adapter(shapes_of(pipeline, (*ATTENTION, "ff.net.0.proj")))
    tensors = {}
    for index, name in enumerate(unet_order(modules, wide=True, then=then)):
        tensors[f"unet:{index}:down"], tensors[f"unet:{index}:up"] = adapter.modules[name]
    metadata = {"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"])} if told else {}
    assert_equal(import_adapter({"x.safetensors": write_tensors(tensors, metadata)}, modules), adapter)


def parse_safeloras(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, list[torch.Tensor]]:
    """The key rules by which the lora_diffusion package takes a file apart, as data flows through them."""
    found: dict[str, list[torch.Tensor]] = {}
    for name in sorted({key.split(":")[0] for key in tensors}):
        info = metadata[name]  # it raises where a tensor has none
        if info == "<embed>":
            found[name] = [tensors[name]]
            continue
        assert isinstance(json.loads(info), list)
        count = sum(key.startswith(f"{name}:") for key in tensors) // 2
        found[name] = []
        for index in range(count):
            up, down = tensors[f"{name}:{index}:up"], tensors[f"{name}:{index}:down"]
            assert up.shape[1] == down.shape[0] == int(metadata[f"{name}:{index}:rank"])
            found[name] += [up, down]
    return found


def test_lora_diffusion_files_follow_its_own_reader(pipeline: StableDiffusionPipeline, modules: frozenset[str]) -> None:
    adapter = full(pipeline, (*ATTENTION, *CLIP, "ff.net.0.proj"))
    files = export_adapter(adapter, "lora_diffusion", modules)
    whole = parse_safeloras(*read_tensors(files["lora_weight.safetensors"]))
    assert set(whole) == {"unet", "text_encoder", "<s1>", "<s-1>"}
    order = unet_order(modules, wide=True)
    for index, name in enumerate(order):
        assert torch.equal(whole["unet"][2 * index].float(), adapter.modules[name].up)
    metadata = read_tensors(files["lora_weight.safetensors"]).metadata
    assert set(json.loads(metadata["unet"])) == {"Attention", "CrossAttention", "GEGLU"}
    assert json.loads(metadata["text_encoder"]) == ["CLIPAttention"]
    half = parse_safeloras(*read_tensors(files["lora_weight.text_encoder.safetensors"]))
    assert set(half) == {"text_encoder"} and torch.equal(half["text_encoder"][0], whole["text_encoder"][0])


def test_lora_diffusion_without_metadata_is_told_by_its_count(
    pipeline: StableDiffusionPipeline, modules: frozenset[str]
) -> None:
    for targets in (ATTENTION, (*ATTENTION, "ff.net.0.proj")):
        adapter = random_adapter(shapes_of(pipeline, targets))
        tensors = read_tensors(export_adapter(adapter, "lora_diffusion", modules)["lora_weight.safetensors"]).tensors
        assert_equal(import_adapter({"x.safetensors": write_tensors(tensors, {})}, modules), adapter)
    tensors.popitem()
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("unet:0:")}
    with pytest.raises(AdapterError, match="another base"):
        import_adapter({"x.safetensors": write_tensors(tensors, {})}, modules)


def test_what_lora_diffusion_cannot_hold_is_named(pipeline: StableDiffusionPipeline, modules: frozenset[str]) -> None:
    for targets, message in ((("proj_in",), "no place for.*proj_in"), (("to_q",), "needs a change of.*to_k")):
        with pytest.raises(AdapterError, match=message):
            export_adapter(random_adapter(shapes_of(pipeline, targets)), "lora_diffusion", modules)
    with pytest.raises(AdapterError, match="which base"):
        export_adapter(full(pipeline), "lora_diffusion")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "Nothing to import"),
        ({"a.bin": b"\x80\x02}q\x00."}, "never pickles"),
        ({"a.safetensors": write_tensors({}, {})}, "no known format"),
        ({"a.safetensors": write_tensors({"model.weight": torch.ones(2), "b": torch.ones(1)}, {})}, "no known format"),
        ({"a.safetensors": write_tensors({"lora_unet_x.lora_down.weight": torch.ones(1, 2)}, {})}, "1 keys fit no"),
        ({"a.safetensors": write_tensors({"lora_unet_x.hada_w1_a": torch.ones(1, 2)}, {})}, "is a LoKr or LoHa file"),
        ({"a.safetensors": write_tensors({"unet.x.lora.down.weight": torch.ones(1, 2)}, {})}, "unet.x.lora"),
        (
            {"lora_unet_unet.safetensors": write_tensors({"lora_unet_unet_x_lora_down_weight": torch.ones(1)}, {})},
            "fit no",
        ),
        ({"adapter_config.json": b'{"use_dora": true}'}, "use_dora"),
        ({"adapter_config.json": b'{"init_lora_weights": "pissa"}'}, "pissa"),
        ({"adapter_config.json": b'{"peft_type": "LOHA"}'}, "LOHA"),
        ({"adapter_config.json": b"{"}, "no JSON"),
    ],
)
def test_an_import_that_does_not_fit_is_an_error_with_names(
    files: dict[str, bytes], message: str, modules: frozenset[str]
) -> None:
    with pytest.raises(AdapterError, match=message):
        import_adapter(files, modules)


def test_one_key_too_many_is_an_error(pipeline: StableDiffusionPipeline, modules: frozenset[str]) -> None:
    data = export_adapter(random_adapter(shapes_of(pipeline, ATTENTION)), "kohya")["adapter.safetensors"]
    tensors = read_tensors(data).tensors
    name = next(key for key in tensors if key.endswith("alpha")).removesuffix("alpha")
    for key, value, message in (
        (f"{name}dora_scale", torch.ones(1), "dora_scale"),
        (f"{name}lora_up.weight", tensors[f"{name}lora_up.weight"] * float("nan"), "NaN"),
        (f"{name}alpha", torch.ones(3), "one number"),
    ):
        with pytest.raises(AdapterError, match=message):
            import_adapter({"a.safetensors": write_tensors(tensors | {key: value}, {})}, modules)
    del tensors[f"{name}lora_up.weight"]
    with pytest.raises(AdapterError, match="no 'up' tensor"):
        import_adapter({"a.safetensors": write_tensors(tensors, {})}, modules)


def test_an_ambiguous_kohya_name_is_not_guessed() -> None:
    tensors = {"lora_unet_a_b.lora_down.weight": torch.ones(1, 2), "lora_unet_a_b.lora_up.weight": torch.ones(2, 1)}
    with pytest.raises(AdapterError, match="unet.a.b, unet.a_b"):
        import_adapter({"a.safetensors": write_tensors(tensors, {})}, ["unet.a.b", "unet.a_b"])
    low = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(AdapterError, match="lora_unet_a_b"):
        export_adapter(Adapter({"unet.a.b": low, "unet.a_b": low}), "kohya")


def test_merging_is_the_exact_weighted_sum(pipeline: StableDiffusionPipeline) -> None:
    one = random_adapter(shapes_of(pipeline, WIDE), seed=1)
    two = random_adapter(shapes_of(pipeline, ATTENTION), seed=2)
    merged = merge_adapters([(one, 0.7), (two, -0.3)])
    for name, low in merged.modules.items():
        wanted = 0.7 * one.modules[name].delta()
        if name in two.modules:
            wanted = wanted - 0.3 * two.modules[name].delta()
            assert low.rank == one.modules[name].rank + two.modules[name].rank
        torch.testing.assert_close(low.delta(), wanted, atol=1e-5, rtol=1e-5)
    load_adapter(save_adapter(merged))
    name, low = next(iter(one.modules.items()))
    with pytest.raises(AdapterError, match="different bases"):
        merge_adapters([(one, 1.0), (Adapter({name: LowRank(low.down[:, :1], low.up)}), 1.0)])
    with pytest.raises(AdapterError, match="different embeddings"):
        merge_adapters([(Adapter({}, {"<s>": torch.ones(2)}), 1.0), (Adapter({}, {"<s>": torch.zeros(2)}), 1.0)])
    with pytest.raises(AdapterError, match="at least one"):
        merge_adapters([])


def test_reducing_the_rank_gives_the_nearest(pipeline: StableDiffusionPipeline) -> None:
    one = random_adapter(shapes_of(pipeline, WIDE), rank=3)
    back = reduce_rank(merge_adapters([(one, 0.5), (one, 0.5)]), 4)  # its true rank is 3 or 4: nothing is lost
    for name, low in back.modules.items():
        assert low.rank <= 4
        torch.testing.assert_close(low.delta(), one.modules[name].delta(), atol=1e-5, rtol=1e-4)
    small = reduce_rank(one, 1)
    for name, low in small.modules.items():
        u, s, v = torch.linalg.svd(one.modules[name].delta().flatten(1).double())
        nearest = (u[:, :1] * s[:1]) @ v[:1]
        torch.testing.assert_close(low.delta().flatten(1).double(), nearest, atol=1e-5, rtol=1e-3)
    with pytest.raises(AdapterError, match="at least 1"):
        reduce_rank(one, 0)
