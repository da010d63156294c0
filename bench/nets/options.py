from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


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
