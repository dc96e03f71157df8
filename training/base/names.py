"""The canonical names of layers in adapters, which every format is translated to and from."""


def canonical(component: str, module: str) -> str:
    """The adapter key of a module: `unet.down_blocks…to_q`, `text_encoder.text_model.encoder.layers.0…q_proj`.

    transformers >= 5.6 has lost the `text_model.` level of CLIP; every adapter file in the world has it. The projection
    of a CLIP that has one stands beside that level.
    """
    if component.startswith("text_encoder") and not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"
    return f"{component}.{module}"
