from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator


class AugmentationOptions(BaseModel):
    """How strongly faces are varied in recogniser training. Zero switches a transform off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    shift: float = Field(
        0.0, ge=0, le=0.5, description="Largest translation in each direction, as a share of the image side."
    )
    zoom: float = Field(0.0, ge=0, le=1, description="Largest relative change of size: 1 / (1 + zoom) to 1 + zoom.")
    rotation: float = Field(0.0, ge=0, le=180, description="Largest in-plane rotation, in degrees.")
    brightness: float = Field(0.0, ge=0, le=1, description="Largest additive change, on [0, 1] values.")
    contrast: float = Field(0.0, ge=0, le=1, description="Largest relative change of contrast around the image's mean.")
    saturation: float = Field(
        0.0, ge=0, le=1, description="Largest relative change of saturation around each pixel's luma."
    )
    grey: float = Field(0.0, ge=0, le=1, description="Probability of dropping colour.")
    erase: float = Field(0.0, ge=0, le=1, description="Probability of covering a rectangle with mid-grey.")
    erase_area: float = Field(0.25, gt=0, le=1, description="Largest share of the image that the rectangle covers.")
    moved: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the faces that are shifted, zoomed and rotated. Resampling blurs: a network that is to "
        "learn from fine detail has to see some faces without it.",
    )


#: Input range -> scale and shift of faces in [0, 1]. The first is what the field publishes as ONNX.
RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"(255x-127.5)/128": (255 / 128, -127.5 / 128), "0..255": (255.0, 0.0), "0..1": (1.0, 0.0), "-1..1": (2.0, -1.0)}
)
#: Order of the channels. The first is what the field publishes.
COLOURS = ("RGB", "BGR")


class InputForm(BaseModel):
    """What an existing recogniser is fed, where its file does not say it, or wrongly. Empty: read from it, or tried."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Literal["NCHW", "NHWC"] | None = Field(None, description="Order of the axes of its input.")
    size: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="Height and width of its input in pixels: 112, or 112x96.", json_schema_extra={"metavar": "N"}
    )
    range: Literal["(255x-127.5)/128", "0..255", "0..1", "-1..1"] | None = Field(
        None, description="What it is fed of faces x in [0, 1]."
    )
    colours: Literal["RGB", "BGR"] | None = Field(None, description="Order of its colours.")
    batch: int | None = Field(None, ge=1, description="Faces that it takes at once, no more and no fewer.")

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, given: Any) -> Any:
        """A side, or both as text."""
        sides = given.split("x") if isinstance(given, str) else [given] if isinstance(given, int) else given
        return sides * 2 if isinstance(sides, list) and len(sides) == 1 else sides


#: Says nothing: all is read from the file, or tried.
AS_READ = InputForm()
