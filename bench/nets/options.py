from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class AugmentationOptions(BaseModel):
    """How strongly faces are varied in recogniser training. Zero switches a transform off.

    Attributes:
        flip: probability of a horizontal flip.
        shift: largest translation, as a share of the image side, in each direction.
        zoom: largest relative change of size: the face is scaled by 1 / (1 + zoom) to 1 + zoom.
        rotation: largest in-plane rotation, in degrees.
        brightness: largest additive change, on [0, 1] values.
        contrast: largest relative change of contrast around the image's mean.
        saturation: largest relative change of saturation around each pixel's luma.
        grey: probability of dropping colour.
        erase: probability of covering a rectangle with mid-grey.
        erase_area: largest share of the image that the rectangle covers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: float = Field(0.5, ge=0, le=1)
    shift: float = Field(0.0, ge=0, le=0.5)
    zoom: float = Field(0.0, ge=0, le=1)
    rotation: float = Field(0.0, ge=0, le=180)
    brightness: float = Field(0.0, ge=0, le=1)
    contrast: float = Field(0.0, ge=0, le=1)
    saturation: float = Field(0.0, ge=0, le=1)
    grey: float = Field(0.0, ge=0, le=1)
    erase: float = Field(0.0, ge=0, le=1)
    erase_area: float = Field(0.25, gt=0, le=1)
