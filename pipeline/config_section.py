"""What all sections of a config have in common: immutable, strict about types, and an unknown key is an error."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

COMBINATION = "combination"
"""Type of the error about keys that are each right but do not go together."""


def combination_error(message: str, *keys: str) -> PydanticCustomError:
    """For a section's validator: the keys at fault, the first of which leads the message."""
    return PydanticCustomError(COMBINATION, message, {"keys": keys})  # pyright: ignore[reportArgumentType]


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_silent_conversion(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is not the number 1 and "3" is not 3: pydantic would take both without a word."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = get_args(annotation) or (annotation,)
        if (int in kinds or float in kinds) and isinstance(value, (bool, str)):
            raise PydanticCustomError("wrong_type", "not a number")
        if bool in kinds and not isinstance(value, bool):
            raise PydanticCustomError("wrong_type", "neither true nor false")
        return value
