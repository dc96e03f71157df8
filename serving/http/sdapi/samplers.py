"""The samplers and schedules by the names that AUTOMATIC1111 and its clients have for them."""

from serving.http.problems import ApiError
from training.base.facts import SamplerName

# name -> (with the base's own noise levels, with Karras' or None where there is none)
SAMPLERS: dict[str, tuple[SamplerName, SamplerName | None]] = {
    "DDIM": ("ddim", None),
    "Euler": ("euler", "euler_karras"),
    "Euler a": ("euler_a", "euler_a_karras"),
    "DPM++ 2M": ("dpm++_2m", "dpm++_2m_karras"),
}
ALIASES: dict[str, tuple[str, ...]] = {
    "DDIM": (),
    "Euler": ("k_euler",),
    "Euler a": ("k_euler_a", "k_euler_ancestral"),
    "DPM++ 2M": ("k_dpmpp_2m",),
}
AUTOMATIC, KARRAS = "Automatic", "Karras"


def read_sampler(sampler: str | None, schedule: str | None, default: SamplerName) -> SamplerName:
    """The sampler of a request; `default` where neither is named. Names as in `aliases`, in any case; a name may end in
    "Karras", as in "DPM++ 2M Karras". Raises ApiError for an unknown name or a pair that is not served.
    """
    wanted = (schedule or AUTOMATIC).strip().lower()
    if wanted not in (AUTOMATIC.lower(), KARRAS.lower()):
        raise ApiError(
            400, f"Unknown scheduler '{schedule}'. Known: {AUTOMATIC} (the base's own), {KARRAS}.", param="scheduler"
        )
    karras = wanted == KARRAS.lower()
    known = {alias.lower(): (name, with_karras) for name in SAMPLERS for alias, with_karras in _spellings(name)}
    if sampler:
        if sampler.strip().lower() not in known:
            raise ApiError(400, f"Unknown sampler '{sampler}'. Known: {', '.join(SAMPLERS)}.", param="sampler_name")
        name, by_name = known[sampler.strip().lower()]
        karras = karras or by_name
    else:
        name = sampler_label(default)[0]
        karras = karras or default in [with_karras for _, with_karras in SAMPLERS.values()]
    found = SAMPLERS[name][karras]
    if found is None:
        raise ApiError(400, f"'{name}' has no {KARRAS} schedule; use {AUTOMATIC}.", param="scheduler")
    return found


def sampler_label(sampler: SamplerName) -> tuple[str, str]:
    """How AUTOMATIC1111 names a sampler, and its schedule."""
    for name, (plain, karras) in SAMPLERS.items():
        if sampler in (plain, karras):
            return name, KARRAS if sampler == karras else AUTOMATIC
    raise KeyError(sampler)


def aliases(name: str) -> list[str]:
    """The other names that a request may have for the sampler `name`."""
    return [alias for alias, _ in _spellings(name) if alias != name]


def _spellings(name: str) -> list[tuple[str, bool]]:
    """Every name of a sampler, and whether it means Karras' noise levels."""
    plain, karras = SAMPLERS[name]
    found = [(name, False), (plain, False), *((alias, False) for alias in ALIASES[name])]
    if karras:
        found += [(f"{name} {KARRAS}", True), (karras, True), *((f"{alias}_ka", True) for alias in ALIASES[name])]
    return found
