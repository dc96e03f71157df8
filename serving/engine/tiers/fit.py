"""Whether a server can serve an adapter: its rank, words and layers. Messages name the flag that would allow it."""

from serving.config import EngineSpec
from serving.flags import flag
from training.adapters.adapter import Adapter, AdapterError
from training.base.facts import Facts


def check_fit(adapter: Adapter, spec: EngineSpec, facts: Facts) -> None:
    """Raises AdapterError unless an engine of the sizes `spec`, over a base of `facts`, can serve all of `adapter`."""
    if adapter.rank > spec.rank:
        raise AdapterError(
            f"The adapter has rank {adapter.rank}; this server takes up to {spec.rank}. Start it with "
            f"{flag('rank')} {adapter.rank}, or make the adapter smaller: `dreamfleet adapters resize ADAPTER --rank "
            f"{spec.rank} --out ID`."
        )
    vectors = count_vectors(adapter)
    if vectors > spec.words:
        raise AdapterError(
            f"The adapter's words take {vectors} vectors; at most {spec.words} are served. Start the server "
            f"with {flag('words')} {vectors}."
        )
    ends = (*(spec.targets or facts.layers), *(spec.text_encoder_targets or facts.text_layers))
    served = tuple(f".{end}" for end in ends)
    left = [name for name in adapter.modules if not name.endswith(served)]
    if left:  # an adapter must not be served in part
        raise AdapterError(
            f"{len(left)} of {len(adapter.modules)} modules are layers that this server does not adapt, the first is "
            f"'{min(left)}'. Start it with the ends of their names in {flag('targets')} or "
            f"{flag('text_encoder_targets')} too."
        )


def count_vectors(adapter: Adapter) -> int:
    """How many vectors the words of `adapter` have together."""
    return sum(vectors.numel() // vectors.shape[-1] for vectors in adapter.embeddings.values())
