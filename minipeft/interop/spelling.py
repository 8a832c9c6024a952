"""The names that one tensor has in checkpoints of several versions."""

from collections.abc import Mapping


def counterpart(name: str, names: Mapping[str, object]) -> str | None:
    """Return the name under which `names` holds the same tensor, or None."""
    for candidate in _spellings(name):
        if candidate in names:
            return candidate
    return None


def _spellings(name: str) -> list[str]:
    """Return the names that one tensor has had in checkpoints over time."""
    sparse = name.replace(".mlp.", ".block_sparse_moe.")
    dense = name.replace(".block_sparse_moe.", ".mlp.")
    return [
        place
        for known in dict.fromkeys((name, sparse, dense))
        for place in _places(known)
    ]


def _places(name: str) -> list[str]:
    """Return a name with the prefixes that models have had for the same part."""
    inner = name.replace("model.language_model.", "language_model.model.")
    outer = name.replace("language_model.model.", "model.language_model.")
    short = name.removeprefix("model.")
    return [name, inner, outer, short, f"model.{name}", f"base_model.{name}"]
