"""Synthetic faces: parametric heads rendered in torch, the suite's embedded default dataset."""

from bench.data.synthetic.anatomy import Identities, draw_identities
from bench.data.synthetic.dataset import SyntheticOptions, load_synthetic
from bench.data.synthetic.nuisance import Conditions, draw_conditions
from bench.data.synthetic.renderer import render

__all__ = [
    "Conditions",
    "Identities",
    "SyntheticOptions",
    "draw_conditions",
    "draw_identities",
    "load_synthetic",
    "render",
]
