"""The forms a vector is given away in: fewer dimensions, fewer bits. Ranges come from the model, never from the vectors themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from jaxtyping import Float, Shaped

from genembed.errors import CheckpointError, ConfigurationError

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
"""Named as in sentence-transformers, whose codes these are; `float16` is ours."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

RANGES_FILE = "ranges.json"
"""Name of the file in a model folder that holds the ranges of its dimensions."""

_RANGES_VERSION = 1
_LEVELS = 255
_NEED_RANGES = ("int8", "uint8")
_NEED_BYTES = ("binary", "ubinary")


@dataclass(frozen=True, eq=False)
class Ranges:
    """The smallest and the largest value of each dimension, over texts that stand for those to come."""

    minimum: Float[np.ndarray, "dimensions"]
    maximum: Float[np.ndarray, "dimensions"]

    def __post_init__(self) -> None:
        """Refuse ranges that no value could be placed in."""
        if self.minimum.shape != self.maximum.shape or self.minimum.ndim != 1:
            raise ConfigurationError(f"ranges: {self.minimum.shape} minima and {self.maximum.shape} maxima; one of each is needed.")
        with np.errstate(over="ignore", invalid="ignore"):
            empty = np.flatnonzero(~np.isfinite(self.maximum - self.minimum) | ~(self.maximum > self.minimum))
        if len(empty):
            raise ConfigurationError(
                f"ranges: dimension {empty[0]} goes from {self.minimum[empty[0]]} to {self.maximum[empty[0]]}, which has no room for a "
                "value; calibrate on more texts, and on different ones."
            )

    def __len__(self) -> int:
        """Number of dimensions."""
        return len(self.minimum)

    @property
    def step(self) -> Float[np.ndarray, "dimensions"]:
        """Width of one code in each dimension."""
        return np.asarray((self.maximum - self.minimum) / np.float32(_LEVELS))

    @classmethod
    def of(cls, vectors: Float[np.ndarray, "texts dimensions"]) -> Ranges:
        """Measure the ranges of the vectors of calibration texts."""
        if len(vectors) < 2:
            raise ConfigurationError(f"ranges of {len(vectors)} vectors: some hundred texts are needed, of the kind that will be embedded.")
        return cls(vectors.min(0).astype(np.float32), vectors.max(0).astype(np.float32))


def ranges_to_json(ranges: Mapping[int, Ranges], **about: Any) -> dict[str, Any]:
    """Return the object that `ranges_from_json` reads.

    Args:
        ranges: By number of dimensions: a cut vector is made unit length again, so its values are larger.
        **about: What else the file says, such as how many texts were measured.
    """
    pairs = {str(dims): {"minimum": _numbers(own.minimum), "maximum": _numbers(own.maximum)} for dims, own in ranges.items()}
    return {"format_version": _RANGES_VERSION, **about, "dimensions": pairs}


def ranges_from_json(value: Mapping[str, Any], *, source: str) -> dict[int, Ranges]:
    """Read the ranges of a model, by number of dimensions.

    Args:
        value: The parsed JSON object.
        source: Name of the file, for the error message.

    Raises:
        CheckpointError: If it is not such an object.
    """
    if value.get("format_version") != _RANGES_VERSION:
        raise CheckpointError(
            f"{source}: format_version {value.get('format_version')!r} is not {_RANGES_VERSION}; a newer genembed may read it."
        )
    try:
        result = {int(dims): Ranges(_row(pair["minimum"]), _row(pair["maximum"])) for dims, pair in value["dimensions"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{source}: not ranges as genembed calibrate-ranges writes them: {error}") from error
    wrong = next((dims for dims, own in result.items() if len(own) != dims), None)
    if wrong is not None:
        raise CheckpointError(f"{source}: {len(result[wrong])} ranges are given for {wrong} dimensions.")
    return result


def _numbers(values: Float[np.ndarray, "dimensions"]) -> list[float]:
    return [float(f"{value:.9g}") for value in values.tolist()]  # nine digits give every float32 back exactly


def _row(values: Any) -> Float[np.ndarray, "dimensions"]:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
        return np.asarray(values, dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputForm:
    """How many dimensions a vector keeps, and in which numbers; checked when it is made, before anything is embedded."""

    precision: Precision
    dimensions: int
    """Kept from the front."""
    ranges: Ranges | None = None
    """Of so many dimensions; for int8 and uint8 alone."""

    def __post_init__(self) -> None:
        """Refuse a form without a meaning."""
        if self.precision not in PRECISIONS:
            raise ConfigurationError(f"precision={self.precision!r}: choose one of {', '.join(PRECISIONS)}.")
        if self.precision in _NEED_RANGES and self.ranges is None:
            raise ConfigurationError(
                f"precision={self.precision!r}: the model has no ranges for vectors of {self.dimensions} dimensions, and a batch's own are "
                "not taken: one text would get other codes beside other texts. Measure them once: genembed calibrate-ranges MODEL texts.txt"
            )
        if self.precision in _NEED_BYTES and self.dimensions % 8:
            raise ConfigurationError(f"precision={self.precision!r}: eight dimensions go into a byte, and {self.dimensions} do not divide.")

    @property
    def bytes_per_vector(self) -> int:
        """Size of one vector."""
        return -(-self.dimensions * {"float32": 32, "float16": 16, "int8": 8, "uint8": 8}.get(self.precision, 1) // 8)

    def __call__(self, vectors: Float[np.ndarray, "*texts hidden"]) -> Shaped[np.ndarray, "*texts codes"]:
        """Cut vectors to the first dimensions, make them unit length again, and quantise them."""
        return quantise(truncate(vectors, self.dimensions), self.precision, self.ranges)

    def restore(self, codes: Shaped[np.ndarray, "*texts codes"]) -> Float[np.ndarray, "*texts dimensions"]:
        """Return float32 unit vectors as near as can be to those that became these codes."""
        return dequantise(codes, self.precision, self.ranges)


def form_of(
    precision: Precision, truncate_dim: int | None, *, hidden: int, trained: Sequence[int], ranges: Mapping[int, Ranges]
) -> OutputForm:
    """Return the form that a model's vectors are wanted in.

    Args:
        precision: In which numbers.
        truncate_dim: How many dimensions; all if None.
        hidden: Dimensions of the model's vectors.
        trained: Cuts that the model was trained for.
        ranges: The model's own, by number of dimensions.

    Raises:
        ConfigurationError: If the model cannot give this form; the message has those that it can.
    """
    dimensions = hidden if truncate_dim is None else truncate_dim
    check_dimensions(dimensions, hidden=hidden, trained=trained)
    return OutputForm(precision=precision, dimensions=dimensions, ranges=ranges.get(dimensions))


def check_dimensions(dimensions: int, *, hidden: int, trained: Sequence[int], name: str = "truncate_dim") -> None:
    """Refuse to cut vectors where the model was not trained for it.

    Args:
        dimensions: How many are wanted; all of them is no cut.
        hidden: How many there are.
        trained: Cuts that the model was trained for (`ModelSettings.matryoshka_dims`).
        name: Of the option, for the error message.

    Raises:
        ConfigurationError: If this cut was not trained.
    """
    allowed = sorted({*trained, hidden})
    if dimensions not in allowed:
        reason = "was trained to give" if len(allowed) > 1 else "was not trained to give fewer than"
        raise ConfigurationError(f"{name}={dimensions}: this model {reason} {', '.join(map(str, allowed))} dimensions.")


def truncate(vectors: Float[np.ndarray, "*texts hidden"], dimensions: int) -> Float[np.ndarray, "*texts dimensions"]:
    """Keep the first dimensions of unit vectors, and make them unit length again (Matryoshka; Kusupati et al., 2022)."""
    return vectors if dimensions == vectors.shape[-1] else _unit(vectors[..., :dimensions])


def quantise(
    vectors: Float[np.ndarray, "*texts dimensions"], precision: Precision, ranges: Ranges | None = None
) -> Shaped[np.ndarray, "*texts codes"]:
    """Write float vectors in another precision, as sentence-transformers does.

        int8:    clip(floor(255 (x - min) / (max - min)), 0, 255) - 128         binary: packed bits of x > 0, minus 128

    `uint8` and `ubinary` are the same without the offset of 128.

    Args:
        vectors: Float vectors.
        precision: What is wanted.
        ranges: Of each dimension; for int8 and uint8 alone.

    Raises:
        ConfigurationError: If the precision is unknown, or ranges are missing or of another length.
    """
    OutputForm(precision=precision, dimensions=vectors.shape[-1], ranges=ranges)
    if precision in ("float32", "float16"):
        return vectors.astype(precision)
    if precision in _NEED_BYTES:
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else _signed(bits)
    own = _of_length(ranges, vectors.shape[-1])
    codes = np.clip(np.floor((vectors.astype(np.float32) - own.minimum) / own.step), 0, _LEVELS).astype(np.uint8)
    return codes if precision == "uint8" else _signed(codes)


def dequantise(
    codes: Shaped[np.ndarray, "*texts codes"], precision: Precision, ranges: Ranges | None = None
) -> Float[np.ndarray, "*texts dimensions"]:
    """Return float32 unit vectors as near as can be to those that became these codes.

    A code stands for the middle of its interval, a bit for +1 or -1.

    Args:
        codes: What `quantise` returned.
        precision: What it was asked for.
        ranges: What it was given.
    """
    if precision in ("float32", "float16"):
        return _unit(codes.astype(np.float32))  # half precision rounds the length as well
    plain = codes if codes.dtype == np.uint8 else (codes.astype(np.int16) + 128).astype(np.uint8)
    if precision in _NEED_BYTES:
        return _unit(np.unpackbits(plain, axis=-1).astype(np.float32) * 2 - 1)
    own = _of_length(ranges, codes.shape[-1])
    return _unit(own.minimum + (plain + np.float32(0.5)) * own.step)


def _signed(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.int16) - 128).astype(np.int8)


def _of_length(ranges: Ranges | None, dimensions: int) -> Ranges:
    if ranges is None or len(ranges) != dimensions:
        raise ConfigurationError(f"ranges of {0 if ranges is None else len(ranges)} dimensions do not fit vectors of {dimensions}.")
    return ranges


def _unit(vectors: np.ndarray) -> np.ndarray:
    return cast("np.ndarray", vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12)))
