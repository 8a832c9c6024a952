"""Shape annotations: jaxtyping where it is installed, a silent stand-in elsewhere.

`Float[np.ndarray, "r in_features"]` names the axes with the words of the notation
page. The tests check every annotation; a user who has only NumPy pays nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float as Float
    from jaxtyping import Inexact as Inexact
    from jaxtyping import Integer as Integer
    from jaxtyping import Shaped as Shaped
    from jaxtyping import UInt8 as UInt8
else:
    try:
        from jaxtyping import Float, Inexact, Integer, Shaped, UInt8
    except ImportError:

        class _Unchecked:
            """An annotation that nothing checks: `X[array, shape]` is `array`."""

            def __class_getitem__(cls, item):
                """Return the array type and forget the shape."""
                return item[0]

        Float = Inexact = Integer = Shaped = UInt8 = _Unchecked

__all__ = ["Float", "Inexact", "Integer", "Shaped", "UInt8"]
