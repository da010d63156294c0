"""PartialFace: every face shows a random subset of its high-frequency channels, randomly permuted.

Mi et al., *Privacy-Preserving Face Recognition Using Random Frequency Components*, ICCV 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from defenses.base import Defense, DefenseOptions
from defenses.frequency import COLOURS, FrequencyOperator, block_dct
from defenses.ranks import (
    OFFICIAL_PERMUTATIONS,
    OFFICIAL_SUBSETS,
    PAPER_PERMUTATIONS,
    SubsetOptions,
    draw_seed,
    random_permutations,
    subsets_of_layouts,
)


class PartialFaceOptions(SubsetOptions):
    """Options of :class:`PartialFace`."""

    n_permutations: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="n; none: 3 with the official tables (all there are), 6 with random ones (the paper)",
    )
    views: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="r, random copies of each image in recogniser training: 3 in the released code, 18 in the paper",
    )
    selection: Literal["paper", "official"] = Field(
        default="paper",
        description="paper: uniform for every image; official: where a label is known (in training), the subset is one "
        "of the three that the label allows, and uniform at a client, who knows none",
    )
    subset: int | None = Field(default=None, ge=0, description="pins S to this row of the table; none: drawn")
    permutation: int | None = Field(default=None, ge=0, description="pins P to this row of the table; none: drawn")

    @model_validator(mode="after")
    def _ranks_exist(self) -> Self:
        available = len(OFFICIAL_PERMUTATIONS)
        if self.tables == "official" and self.permutation_count > available:
            raise ValueError(
                f"the official tables have {available} permutations, not {self.permutation_count}; use tables=random"
            )
        if self.selection == "official" and self.n_subsets != len(OFFICIAL_SUBSETS):
            raise ValueError(f"selection=official is defined for 6 subsets, these options give {self.n_subsets}")
        if self.subset is not None and self.subset >= self.n_subsets:
            raise ValueError(f"subset must be in 0..{self.n_subsets - 1}, got {self.subset}")
        if self.permutation is not None and self.permutation >= self.permutation_count:
            raise ValueError(f"permutation must be in 0..{self.permutation_count - 1}, got {self.permutation}")
        if self.permutation_count > math.factorial(self.subset_size):
            raise ValueError(
                f"{self.subset_size} channels have only {math.factorial(self.subset_size)} permutations, not "
                f"{self.permutation_count}; set n_permutations"
            )
        return self

    @property
    def permutation_count(self) -> int:
        """n."""
        if self.n_permutations is not None:
            return self.n_permutations
        return len(OFFICIAL_PERMUTATIONS) if self.tables == "official" else PAPER_PERMUTATIONS

    def permutation_table(self) -> Tensor:
        """int64 (n, s): output j takes input P[j]."""
        if self.tables == "official":
            return torch.tensor(OFFICIAL_PERMUTATIONS[: self.permutation_count])
        return random_permutations(self.subset_size, self.permutation_count, self.table_seed)


class PartialFace(Defense):
    """Random frequency components.

    The representation is (N, 3s, H, W), colour-major (s maps of Y, s of Cb, s of Cr), un-normalised block-DCT
    coefficients (within +-78 for the default channels). The state of a face is its rank, int64 (2,): [row S of the
    subset table, row P of the permutation table]. The tables are shared by provider and clients (the secret); the rank
    is never sent.
    """

    name = "partialface"
    summary = "a random subset of the high-frequency channels, permuted, for every face"
    reference = "Mi et al., Privacy-Preserving Face Recognition Using Random Frequency Components, ICCV 2023"
    Options = PartialFaceOptions
    # (sigma, s, r, m, n) = (10, 9, 18, 6, 6), section 5.1; the released tables have three permutations only.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"views": 18, "tables": "random", "n_permutations": 6}
    }
    options: PartialFaceOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.kept_channels: Tensor
        self.subset_table: Tensor
        self.permutation_table: Tensor
        self.register_buffer("kept_channels", torch.tensor(self.options.kept_channels))
        self.register_buffer("subset_table", self.options.subset_table())
        self.register_buffer("permutation_table", self.options.permutation_table())

    @property
    def representation_shape(self) -> tuple[int, int, int]:
        """(3s, H, W)."""
        return (COLOURS * self.options.subset_size, self.image_size, self.image_size)

    @property
    def views(self) -> int:
        """r."""
        return self.options.views

    # -- ranks -----------------------------------------------------------------------------------

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """Ranks of ``count`` faces, int64 (count, 2), uniform but for the pins and ``selection=official`` with labels.

        Raises:
            ValueError: ``labels`` is not one int64 label per face.
        """
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != (count,)):
            raise ValueError(f"labels must be int64 ({count},), got {labels.dtype} {tuple(labels.shape)}")
        if labels is not None and self.options.selection == "official":
            # The 20 triples of 6 subsets in lexicographic order, indexed label mod 20, then one of the three at random.
            triples = torch.combinations(torch.arange(len(OFFICIAL_SUBSETS)), 3)
            subset = triples[labels.cpu() % len(triples), _uniform(3, count, generator)]
        else:
            subset = _uniform(len(self.subset_table), count, generator)
        permutation = _uniform(len(self.permutation_table), count, generator)
        # Pins come after the draws: pinning one leaves the random numbers of the other as they were.
        if self.options.subset is not None:
            subset = torch.full_like(subset, self.options.subset)
        if self.options.permutation is not None:
            permutation = torch.full_like(permutation, self.options.permutation)
        return torch.stack([subset, permutation], dim=1)

    def states(self) -> Tensor:
        """All ranks that the pins leave, int64 (m n, 2)."""
        subset, permutation = self.options.subset, self.options.permutation
        return torch.cartesian_prod(
            torch.arange(len(self.subset_table)) if subset is None else torch.tensor([subset]),
            torch.arange(len(self.permutation_table)) if permutation is None else torch.tensor([permutation]),
        )

    @property
    def secret(self) -> Mapping[str, Tensor]:
        """``subsets`` int64 (m, s), indices into the kept channels, and ``permutations`` int64 (n, s)."""
        return {"subsets": self.subset_table, "permutations": self.permutation_table}

    def guess(self, generator: torch.Generator) -> Self:
        """The same mechanism, as many subsets and permutations, with tables drawn at random."""
        update = {
            "tables": "random",
            "table_seed": draw_seed(generator),
            "n_permutations": self.options.permutation_count,
        }
        return type(self)(self.options.model_copy(update=update), image_size=self.image_size)

    def with_layouts(self, layouts: Tensor) -> Self:
        """The mechanism whose state (i, 0) sends the canonical channels ``layouts[i]``, int64 (K, 3s).

        Each row becomes a subset of its own in the order in which it is sent, under the one permutation that changes
        nothing.

        Raises:
            ValueError: as :func:`~defenses.ranks.subsets_of_layouts`.
        """
        rows = subsets_of_layouts(layouts, len(self.kept_channels), self.options.subset_size)
        unpinned = self.options.model_copy(update={"subset": None, "permutation": None})
        imitation = type(self)(unpinned, image_size=self.image_size).to(self.kept_channels.device)
        imitation.subset_table = rows.to(self.kept_channels.device)
        imitation.permutation_table = torch.arange(rows.shape[1])[None].to(self.kept_channels.device)
        return imitation

    # -- the transform ---------------------------------------------------------------------------

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Channels of each face's own rank, (N, 3s, H, W).

        Raises:
            ValueError: ``state`` is not one rank of the tables per face.
        """
        return block_dct(faces, self.kept_channels[self._kept_indices(state, len(faces))])

    def linear_operator(self, state: Tensor | None) -> FrequencyOperator:
        """The map of one rank, int64 (2,).

        Raises:
            ValueError: ``state`` is not a rank of the tables.
        """
        indices = self._kept_indices(None if state is None else state[None], 1)[0]
        return FrequencyOperator(self.image_size, self.kept_channels[indices])

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """Each map back at its own frequency: (N, 3s, h, w) to (N, 3d, h, w), colour-major, zero elsewhere.

        d counts the kept channels (54), in ascending order.

        Raises:
            ValueError: shapes that do not fit, or ``state`` is not one rank of the tables per representation.
        """
        count = len(representation)
        if representation.ndim != 4 or representation.shape[1] != self.channels:
            raise ValueError(f"expected (N, {self.channels}, h, w), got {tuple(representation.shape)}")
        indices = self._kept_indices(state, count).to(representation.device)
        height, width = representation.shape[2:]
        maps = representation.reshape(count, COLOURS, -1, height, width)
        canonical = maps.new_zeros(count, COLOURS, len(self.kept_channels), height, width)
        target = indices[:, None, :, None, None].expand(maps.shape)
        return canonical.scatter(2, target, maps).flatten(1, 2)

    def describe(self) -> dict[str, Any]:
        """Adds m, n and the kept channels."""
        return super().describe() | {
            "subsets": len(self.subset_table),
            "permutations": len(self.permutation_table),
            "kept_channels": self.kept_channels.tolist(),
        }

    def _kept_indices(self, state: Tensor | None, count: int) -> Tensor:
        """Indices into the kept channels in output order, int64 (N, s)."""
        if state is None:
            raise ValueError(f"{self.name} needs the state of each face, int64 ({count}, 2)")
        if state.dtype != torch.int64 or state.shape != (count, 2):
            raise ValueError(f"{self.name} expects a state int64 ({count}, 2), got {state.dtype} {tuple(state.shape)}")
        limits = torch.tensor([len(self.subset_table), len(self.permutation_table)])
        on_cpu = state.detach().cpu()
        if bool(((on_cpu < 0) | (on_cpu >= limits)).any()):
            raise ValueError(f"{self.name} has subsets 0..{limits[0] - 1} and permutations 0..{limits[1] - 1}")
        subset, permutation = state.to(self.subset_table.device).unbind(1)
        return self.subset_table[subset].gather(1, self.permutation_table[permutation])


def _uniform(limit: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(limit, (count,), generator=generator, device=generator.device).cpu()
