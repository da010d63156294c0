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

from defenses.base import DefenseOptions
from defenses.ranks import (
    OFFICIAL_PERMUTATIONS,
    OFFICIAL_SUBSETS,
    PAPER_PERMUTATIONS,
    FrequencySubset,
    SubsetOptions,
    random_permutations,
)


class PartialFaceOptions(SubsetOptions):
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
        if self.permutation_count > (possible := math.factorial(self.subset_size)):
            raise ValueError(
                f"{self.subset_size} channels have only {possible} permutations, not {self.permutation_count}; set "
                "n_permutations"
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

    def with_random_tables(self, seed: int) -> Self:
        return super().with_random_tables(seed).model_copy(update={"n_permutations": self.permutation_count})


class PartialFace(FrequencySubset):
    """Random frequency components.

    The coefficients are within +-78 for the default channels at the published factor of 8; a smaller ``upsampling``
    sends fewer and larger ones. The state of a face is its rank, int64 (2,): [row S of
    the subset table, row P of the permutation table]. The tables are shared by provider and clients (the secret); the
    rank is never sent.
    """

    name = "partialface"
    summary = "a random subset of the high-frequency channels, permuted, for every face"
    reference = "Mi et al., Privacy-Preserving Face Recognition Using Random Frequency Components, ICCV 2023"
    fidelity = "faithful"
    weakened: ClassVar[Mapping[str, Any]] = {"subset_size": 54, "tables": "random", "n_permutations": 1}
    hidden = "secret: tables of subsets and permutations; state: which of them a face was given"
    departures: ClassVar[Mapping[str, str]] = {
        "selection=official": "in training, a label allows three of the six subsets only",
    }
    Options = PartialFaceOptions
    # (sigma, s, r, m, n) = (10, 9, 18, 6, 6), section 5.1; the released tables have three permutations only.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"views": 18, "tables": "random", "n_permutations": 6}
    }
    options: PartialFaceOptions
    subset_table: Tensor
    permutation_table: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.register_buffer("kept_channels", torch.tensor(self.options.kept_channels))
        self.register_buffer("subset_table", self.options.subset_table())
        self.register_buffer("permutation_table", self.options.permutation_table())

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

    def with_layouts(self, layouts: Tensor) -> Self:
        """The mechanism whose state (i, 0) sends the canonical channels ``layouts[i]``, int64 (K, 3s).

        Each row becomes a subset of its own in the order in which it is sent, under the one permutation that changes
        nothing.

        Raises:
            ValueError: layouts of another kind.
        """
        rows = self._subsets_of(layouts)
        imitation = self._imitation(self.options.model_copy(update={"subset": None, "permutation": None}))
        imitation.subset_table, imitation.permutation_table = (
            rows,
            torch.arange(rows.shape[1], device=rows.device)[None],
        )
        return imitation

    def describe(self) -> dict[str, Any]:
        """Adds m, n and the kept channels."""
        return super().describe() | {
            "subsets": len(self.subset_table),
            "permutations": len(self.permutation_table),
            "kept_channels": self.kept_channels.tolist(),
        }

    def sent(self, state: Tensor | None, count: int) -> Tensor:
        if state is None:
            raise ValueError(f"{self.name} needs the state of each face, int64 ({count}, 2)")
        if state.dtype != torch.int64 or state.shape != (count, 2):
            raise ValueError(f"{self.name} expects a state int64 ({count}, 2), got {state.dtype} {tuple(state.shape)}")
        rows = (len(self.subset_table), len(self.permutation_table))
        if count:
            least, largest = (extreme.tolist() for extreme in state.aminmax(dim=0))
            if min(least) < 0 or largest[0] >= rows[0] or largest[1] >= rows[1]:
                raise ValueError(f"{self.name} has subsets 0..{rows[0] - 1} and permutations 0..{rows[1] - 1}")
        device = self.subset_table.device
        subset, permutation = state.to(device, non_blocking=device.type == "cuda").unbind(1)
        return self.subset_table[subset].gather(1, self.permutation_table[permutation])


def _uniform(limit: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(limit, (count,), generator=generator, device=generator.device).cpu()
