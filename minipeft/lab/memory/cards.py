"""What graphics cards hold: their true size, which the number on the box rounds."""

from collections.abc import Mapping

MIB = 2**20

CARDS: Mapping[str, int] = {
    name: mebibytes * MIB
    for name, mebibytes in {
        "T4, sold as 16 GB": 15_360,
        "A10, sold as 24 GB": 23_028,
        "L4, sold as 24 GB": 23_034,
        "RTX 4090, sold as 24 GB": 24_564,
        "RTX 3090, sold as 24 GB": 24_576,
        "RTX 5090, sold as 32 GB": 32_607,
        "L40S, sold as 48 GB": 46_068,
        "RTX A6000, sold as 48 GB": 49_140,
        "H100, sold as 80 GB": 81_559,
        "A100, sold as 80 GB": 81_920,
        "H200, sold as 141 GB": 143_771,
    }.items()
}
"""Bytes by the card's name: what `nvidia-smi` reports, which is MiB."""


def those_that_hold(size: float) -> list[str]:
    """Return the cards on which this many bytes fit, the smallest first."""
    return [name for name, held in CARDS.items() if held >= size]
