"""Which layers `distill.layers` names. Imports nothing heavy: `validate` and `submit` ask, too."""

from __future__ import annotations

from .errors import ConfigError


def parse_layers(layers: str | None, num_layers: int) -> tuple[int, ...]:
    """`8-15` or `0,2,5-7` as ascending layer numbers; None means all.

    Raises:
        ConfigError: a layer that the model does not have, or one named twice.
    """
    if layers is None:
        return tuple(range(num_layers))
    spans = []
    for span in layers.replace(" ", "").split(","):
        first, _, last = span.partition("-")
        spans.append((int(first), int(last or first)))
    highest = max(last for _, last in spans)
    if highest >= num_layers:
        raise ConfigError(
            f"distill.layers: {layers} asks for layer {highest}; the model has layers 0 to {num_layers - 1}."
        )
    numbers = [number for first, last in spans for number in range(first, last + 1)]
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"distill.layers: {layers} names a layer twice.")
    return tuple(sorted(numbers))
