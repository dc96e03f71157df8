"""Fields of AUTOMATIC1111's API that are not supported: refused by name, so that no picture differs without an error.

Clients send most fields with every request. A field passes if it asks for nothing: it is empty, at its default, or
belongs to a feature that is off.
"""

from collections.abc import Mapping

from serving.http.problems import ApiError
from training.base.facts import SamplerName

# What a field may be beside empty: null, false, "", [] and {}.
_DEFAULTS: dict[str, tuple[object, ...]] = {
    "subseed_strength": (0,),
    "seed_resize_from_w": (0, -1),
    "seed_resize_from_h": (0, -1),
    "s_churn": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "resize_mode": (0,),
    "initial_noise_multiplier": (1,),
    "script_name": ("None",),
    "refiner_checkpoint": ("None",),
    "clip_skip": (0, 1),
}
# Settings of features that another field turns on, and fields that do not concern the picture.
_IDLE = frozenset(
    {
        *("firstphase_width", "firstphase_height", "hr_checkpoint_name", "hr_sampler_name", "hr_scheduler"),
        *("hr_prompt", "hr_negative_prompt", "mask_blur", "mask_blur_x", "mask_blur_y", "mask_round"),
        *("inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert"),
        "image_cfg_scale",
        *("subseed", "seed_enable_extras", "s_tmin", "s_tmax", "refiner_switch_at", "script_args", "force_task_id"),
        *("do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards", "include_init_images"),
        *("save_images", "hr_additional_modules"),  # whether pictures are kept is the operator's `history`
        # clients' own, which they send along: SillyTavern's address of the server, a Photoshop plug-in's notes
        *("url", "auth", "original_prompt", "original_negative_prompt", "use_prompt_shortcut", "use_sharp_mask"),
        *("prompt_shortcut_ui_dict", "uniqueDocumentId", "mode", "selection_info", "init_image_name"),
    }
)
_SAME = (("sd_vae", "None"), ("CLIP_stop_at_last_layers", 0))  # other spellings of what an option is
_WHY = {
    "mask": "a mask belongs to a picture: send both to img2img",
    "styles": "this server keeps no styles; write them into the prompt",
    "script_name": "this server runs no scripts",
    "subseed_strength": "this server has no variation seeds",
}


def refuse_undone(fields: Mapping[str, object], sampler: SamplerName, base: str) -> None:
    """Raises ApiError for the first of a body's undeclared `fields` that asks for something."""
    for name, value in fields.items():
        if _is_empty(value) or name in _IDLE or value in _DEFAULTS.get(name, ()):
            continue
        if name == "eta":
            _check_eta(value, sampler)
        elif name == "alwayson_scripts" and isinstance(value, Mapping):
            _check_scripts(value)
        elif name == "override_settings" and isinstance(value, Mapping):
            check_options(value, base, "override_settings")
        else:
            shown = name[:80]
            why = _WHY.get(name, "this server does nothing with it")
            raise ApiError(400, f"'{shown}' is not done: {why}. Leave '{shown}' out.", param=shown)


def options(base: str, base_hash: str = "") -> dict[str, object]:
    """The options, the same for everybody; no call can change one."""
    return {
        "sd_model_checkpoint": base,
        "sd_checkpoint_hash": base_hash,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "sd_lora": "None",
        "eta_noise_seed_delta": 0,
        "emphasis": "Original",
        "inpainting_mask_weight": 1.0,
    }


def check_options(wanted: Mapping[str, object], base: str, param: str | None = None, base_hash: str = "") -> None:
    """Raises ApiError for the first option whose value is not the server's; `param` is the field that they came in."""
    held, where = options(base, base_hash), f" in '{param}'" if param else ""
    for name, value in wanted.items():
        if _is_empty(value) or name in held and value == held[name] or (name, value) in _SAME:
            continue
        shown = name[:80]
        has = f"it is {held[name]!r}" if name in held else f"known are {', '.join(held)}"
        raise ApiError(400, f"The option '{shown}'{where} cannot be set: {has}. Leave it out.", param=param or shown)


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_off(argument: object) -> bool:
    """Whether an extension's argument is empty, or a unit that says that it is off."""
    if isinstance(argument, Mapping):
        return any(argument.get(name) is False for name in ("enabled", "enable", "is_enabled")) or not argument
    return _is_empty(argument)


def _check_eta(value: object, sampler: SamplerName) -> None:
    """`eta` is how much noise a step draws: 0 is what DDIM does here, 1 what Euler a does; others do not have it."""
    held = 0 if sampler == "ddim" else 1 if sampler.startswith("euler_a") else value
    if value != held:
        raise ApiError(400, f"'eta' is {held} with this sampler and cannot be set. Leave 'eta' out.", param="eta")


def _check_scripts(scripts: Mapping[str, object]) -> None:
    """An extension asks for nothing if its arguments are empty or off, or the first, which switches it, is off."""
    for name, script in scripts.items():
        arguments = script.get("args") if isinstance(script, Mapping) else script
        asked = arguments if isinstance(arguments, list) else [arguments]
        if name.lower() != "controlnet" and asked and asked[0] is not False and not all(map(_is_off, asked)):
            raise ApiError(
                400,
                f"'alwayson_scripts' asks for '{name[:80]}': this server has no extension but ControlNet.",
                param="alwayson_scripts",
            )
