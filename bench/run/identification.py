"""Recognition beyond pairs of images: templates of several (IJB-B, IJB-C), and the victims among many distractors.

Every image is sent on its own, as one query with a draw of its own, and what the recogniser makes of it is pooled or
searched. Under keys all show one, as everybody has stolen it: a key of each person's would tell people apart in place
of the face. Template defences enrol and match what was pooled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.decode import by_threads, workers
from bench.data.encoded import RecordSource
from bench.data.faces import FaceSet
from bench.data.ijb import Janus, find_janus, open_janus
from bench.data.loaders import DATASETS, load
from bench.data.splits import telling_name
from bench.measures import KINDS, Estimate, Measure
from bench.metrics.bootstrap import mean_of_independent, tar_estimates
from bench.metrics.identification import (
    FPIRS,
    TEMPLATE_FARS,
    Compare,
    Searches,
    cosines,
    places,
    pool_templates,
    rank1,
    search,
    tpir_at_fpirs,
)
from bench.metrics.identity import content_ids, select_probes
from bench.progress import Report
from bench.recognition.embed import embed_faces
from bench.recognition.state import resumed
from bench.results import (
    Distractors,
    Identification,
    LargeGallery,
    TemplateProtocol,
    TemplateRecognition,
)
from bench.run.provider import Stages
from bench.run.sources import fingerprint
from bench.run.stage import CODE, Job, make_key, tensor_job
from defenses.base import Defense
from defenses.template import TemplateDefense

#: Images that are embedded before a killed run need not do them again, and those that a thread reads at once.
PART, AT_ONCE = 2048, 256
#: Scores of a template defence at once, a side: each pair is laid out.
_MATCHED = 256


@dataclass(frozen=True, slots=True)
class _System:
    """A recogniser behind a defence, where all hold one key.

    ``stream`` is what draws are named after.
    """

    stages: Stages
    defense: Defense
    stream: str

    def _held(self, count: int) -> Tensor | None:
        keys = self.defense.draw_keys(1, self.stages.streams.generator(f"{self.stream}/keys"))
        return None if keys is None else keys.expand(count, -1)

    def embed(self, images: Tensor, first: int = 0) -> Tensor:
        """Unit rows, float32 (n, D), of images uint8 (n, 3, H, W) that are numbered from ``first``."""
        stages = self.stages
        if isinstance(self.defense, TemplateDefense):
            return stages.system(self.defense).embed(f"{self.stream}/{first}", images)
        return embed_faces(
            stages.recogniser(self.defense),
            self.defense,
            FaceSet(images, torch.zeros(len(images), dtype=torch.int64), ("",)),
            generators=lambda number: stages.streams.generator(f"{self.stream}/{first + number}"),
            batch_size=stages.config.batch_size,
            keys=self._held(len(images)),
            fabric=stages.machine.fabric,
        )

    def stored(self, rows: Tensor) -> Tensor:
        """What is stored of embeddings (n, D)."""
        if not isinstance(self.defense, TemplateDefense):
            return rows
        return self.stages.system(self.defense).enrol(self.stream, rows, self._held(len(rows)))

    def scores(self, stored: Tensor, fresh: Tensor) -> Tensor:
        """Of n stored templates and n fresh embeddings (n, D), one by one: (n,)."""
        if not isinstance(self.defense, TemplateDefense):
            return (stored * fresh).sum(dim=1)
        return self.stages.system(self.defense).match(self.stream, stored, fresh, self._held(len(fresh)))

    @property
    def compare(self) -> Compare:
        """All fresh embeddings with all that are stored."""
        if not isinstance(self.defense, TemplateDefense):
            return cosines
        return lambda fresh, stored: self.scores(
            stored.repeat(len(fresh), 1), fresh.repeat_interleave(len(stored), dim=0)
        ).view(len(fresh), len(stored))

    @property
    def chunk(self) -> int:
        """Rows of either side that are compared at a time."""
        return _MATCHED if isinstance(self.defense, TemplateDefense) else 4 * _MATCHED

    def key(self, **inputs: object) -> str:
        """Key of a stage that embeds by this system."""
        stages = self.stages
        content = {
            "recogniser": stages.recogniser_key(self.defense, "provider"),
            "defense": stages.defense_key(self.defense),
            "batch_size": stages.config.batch_size,
            **inputs,
        }
        return make_key(content, (*CODE["verification"], *CODE["identification"]))


def _in_parts(
    faces: FaceSet | RecordSource, resume: Path, report: Report, work: Callable[[Tensor, Tensor], dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """``work(images, rows)`` of all images, a part after the other, each kept in ``resume``."""
    for rows in torch.arange(len(faces)).split(PART):
        file = resume / f"{int(rows[0])}.safetensors"
        yield resumed(file, lambda rows=rows: work(*_read(faces, rows)))  # type: ignore[misc]
        report(int(rows[-1]) + 1, len(faces))


def _read(faces: FaceSet | RecordSource, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The images ``rows``, uint8 (n, 3, H, W), without those that cannot be decoded and may be left out; and which."""
    if isinstance(faces, FaceSet):
        return faces.images[rows], rows
    batches = list(by_threads(faces.read, (part.numpy() for part in rows.split(AT_ONCE)), workers()))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.rows for batch in batches])


# -- templates of several images -------------------------------------------------------------------


class Pooled(NamedTuple):
    """Templates: their numbers, int64 (T,) ascending, unit rows (T, D), and whether an image is learnt from, (T,)."""

    numbers: Tensor
    rows: Tensor
    learnt: Tensor


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, image_size: int) -> Janus:
    """A benchmark, whose lists may have millions of lines, read once for all that is made of them."""
    return open_janus(folder, image_size)


def pooled_job(stages: Stages, defense: Defense, folder: Path) -> Job[Pooled]:
    """The stage that embeds the images of a benchmark, each behind the defence, and pools them into templates.

    An image weighs as the detector's score says.
    """
    name = find_janus(folder) or folder.name
    system = _System(stages, defense, f"queries/{name}")

    def compute(resume: Path, report: Report) -> dict[str, Tensor]:
        janus = _opened(folder, stages.config.image_size)

        def work(images: Tensor, rows: Tensor) -> dict[str, Tensor]:
            faces = FaceSet(images, torch.zeros(len(images), dtype=torch.int64), ("",))
            return {"rows": system.embed(images, int(rows[0])), "learnt": torch.from_numpy(stages.learnt(faces))}

        parts = list(_in_parts(janus.source, resume, report, work))
        templates, media = torch.from_numpy(janus.images.templates), torch.from_numpy(janus.images.media)
        learnt = templates[torch.cat([part["learnt"] for part in parts])].unique()
        features = torch.cat([part.pop("rows") for part in parts])
        features *= torch.from_numpy(janus.weights)[:, None]
        numbers, rows = pool_templates(features, templates, media)
        return {"numbers": numbers, "rows": rows, "learnt": torch.isin(numbers, learnt)}

    key = system.key(data=fingerprint(folder), image_size=stages.config.image_size)
    what = f"embed the images of {name} on {defense.name}"
    return tensor_job(f"pool-{name}-{defense.name}", key, what, "templates.safetensors", compute, _pooled)


def _pooled(tensors: dict[str, Tensor]) -> Pooled:
    return Pooled(tensors["numbers"], tensors["rows"], tensors["learnt"])


def measure_templates(
    stages: Stages, defense: Defense, plain: Defense, folder: Path
) -> tuple[TemplateProtocol, list[str]]:
    """Verification and identification of a benchmark's templates, protected and plain; and what to warn of."""
    janus = _opened(folder, stages.config.image_size)
    protected, unprotected = (stages.do(pooled_job(stages, target, folder)) for target in (defense, plain))
    subjects = _subjects(janus, protected.numbers)
    known = subjects[protected.learnt & (subjects >= 0)]
    left = protected.learnt | torch.isin(subjects, known)
    notes = []
    if count := int(left.sum()):
        notes.append(
            f"{janus.name}: {count} templates of people whose image a recogniser learns from are left out, with all "
            "pairs and searches of theirs"
        )
    with stages.timed("measure", f"measure {janus.name}"):
        figures = {
            name: _templates(_System(stages, target, f"templates/{janus.name}"), janus, pooled, subjects, left)
            for name, target, pooled in (("protected", defense, protected), ("unprotected", plain, unprotected))
        }
    return TemplateProtocol(templates=len(left), images=len(janus.source), **figures), notes


def _subjects(janus: Janus, numbers: Tensor) -> Tensor:
    """Whose each template is, int64 (T,); -1 where the lists do not say."""
    owners = janus.subjects()
    return torch.tensor([owners.get(number, -1) for number in numbers.tolist()])


def _templates(system: _System, janus: Janus, pooled: Pooled, subjects: Tensor, left: Tensor) -> TemplateRecognition:
    stored, tar_at_far, compared = system.stored(pooled.rows), dict[str, Measure](), 0
    if janus.pairs is not None:
        ends, same = places(pooled.numbers, torch.from_numpy(janus.pairs[0])), torch.from_numpy(janus.pairs[1])
        kept = ~left[ends].any(dim=1)
        ends, same, compared = ends[kept], same[kept], int(kept.sum())
        scores = torch.cat(
            [system.scores(stored[part[:, 0]], pooled.rows[part[:, 1]]) for part in ends.split(_MATCHED**2)]
        )
        people = subjects[ends] if bool((subjects[ends] >= 0).all()) else None
        why = f"the lists of {janus.name} do not say whose every template is: no interval over identities"
        rates = tar_estimates(scores, same, list(TEMPLATE_FARS.values()), people, why)
        tar_at_far = {name: KINDS["tar_at_far"].measure(rates[far]) for name, far in TEMPLATE_FARS.items()}

    def of(part: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Tensor:
        found = places(pooled.numbers, torch.from_numpy(part[0]))
        return found[~left[found]]

    galleries = dict[str, Identification]()
    if janus.probes is not None:
        probes = of(janus.probes)
        for name, part in janus.galleries.items():
            gallery = of(part)
            searched = pooled.rows[probes], subjects[probes], stored[gallery], subjects[gallery]
            found = search(*searched, compare=system.compare, chunk=system.chunk)
            galleries[name] = Identification(**_figures(found, system.stages)._asdict(), **_counts(found, len(gallery)))
    return TemplateRecognition(
        tar_at_far=tar_at_far, pairs=compared, galleries=galleries, mean=_mean(janus, list(galleries.values()))
    )


class _Figures(NamedTuple):
    rank1: Measure
    tpir_at_fpir: dict[str, Measure]


def _figures(found: Searches, stages: Stages, *, leave_out: bool = False, withheld: str | None = None) -> _Figures:
    """Rank-1 and TPIR@FPIR of searches; null with the reason where they are ``withheld``."""
    draws, replicates = stages.streams.generator("identification"), stages.config.bootstrap
    if withheld is None:
        first = rank1(found, draws, replicates=replicates)
        rates = tpir_at_fpirs(found, draws, leave_out=leave_out, replicates=replicates)
    else:
        first = Estimate(None, None, len(found.mate), withheld)
        rates = dict.fromkeys(FPIRS, first)
    return _Figures(
        KINDS["identified"].measure(first), {name: KINDS["tpir_at_fpir"].measure(rate) for name, rate in rates.items()}
    )


def _counts(found: Searches, gallery: int) -> dict[str, int]:
    return {"gallery": gallery, "probes": len(found.mate), "mated": int(found.mated.sum())}


def _mean(janus: Janus, galleries: list[Identification]) -> Identification | None:
    """The mean over galleries, with intervals where nobody is in two of them."""
    if not galleries:
        return None
    subjects = np.concatenate([np.unique(owners) for _, owners in janus.galleries.values()])
    apart = len(np.unique(subjects)) == len(subjects)

    def mean(kind: str, measures: list[Measure]) -> Measure:
        parts = [Estimate(m.value, m.ci95, m.n, m.reason) for m in measures]
        estimate = mean_of_independent(parts)
        if not apart and estimate.value is not None:
            estimate = Estimate(estimate.value, None, estimate.n, "galleries share subjects: no interval of their mean")
        return KINDS[kind].measure(estimate)

    return Identification(
        rank1=mean("identified", [gallery.rank1 for gallery in galleries]),
        tpir_at_fpir={
            name: mean("tpir_at_fpir", [gallery.tpir_at_fpir[name] for gallery in galleries]) for name in FPIRS
        },
        **{name: sum(getattr(gallery, name) for gallery in galleries) for name in ("gallery", "probes", "mated")},
    )


# -- distractors -----------------------------------------------------------------------------------


class Distracted(NamedTuple):
    """N probes among the enrolled, and among distractors, cut at powers of ten, each a random part of the next.

    Attributes:
        mate: float32 (N,), the score of the person's enrolled image.
        other: float32 (N,), the highest score of anybody else's.
        best: float32 (B, N), of the distractors that come with each of B sizes; -inf where there are none.
        counts: int64 (B,), how many these are.
        left_out: how many are the victims', or learnt from, or cannot be decoded.
    """

    mate: Tensor
    other: Tensor
    best: Tensor
    counts: Tensor
    left_out: int


def open_distractors(stages: Stages) -> FaceSet | RecordSource:
    """The faces of their data set, on the disk where they can be; what cannot be decoded is skipped.

    Raises:
        MissingError, DataError, UsageError: there is no such data set, or its options are none.
    """
    config, source = stages.config, stages.config.data_of("distractors")
    faces = load(
        source.dataset,
        data_root=source.root,
        image_size=config.image_size,
        seed=stages.streams.seed_for("data/distractors"),
        options=config.options_of("distractors"),
        stream=DATASETS.get(source.dataset).open is not None,
        part="faces",
    ).faces
    if isinstance(faces, FaceSet):
        return faces
    return replace(faces, source=faces.source.reading("skip"))


class Sought(NamedTuple):
    """Victim images: one of each person, int64 (G,), and the others of these people, no copies of it, int64 (N,)."""

    gallery: Tensor
    probes: Tensor


def sought(stages: Stages) -> Sought:
    """Who is enrolled and who is looked for.

    Raises:
        DataError: nobody has two different images.
    """
    victims = stages.splits.victims
    gallery = select_probes(victims, 1, stages.streams.generator("identification/gallery")).gallery
    content, enrolled = content_ids(victims.images), torch.full((len(victims.names),), -1)
    enrolled[victims.labels[gallery]] = gallery
    own = enrolled[victims.labels]
    probes = ((own >= 0) & (content != content[own.clamp(min=0)])).nonzero().flatten()
    return Sought(gallery, probes)


def _sizes(count: int) -> list[int]:
    """10, 100, ... and all."""
    sizes, size = list[int](), 10
    while size < count:
        sizes.append(size)
        size *= 10
    return [*sizes, count]


def distracted_job(stages: Stages, defense: Defense) -> Job[Distracted]:
    """The stage that searches the victims' probes among distractors.

    A part of the distractors after the other is embedded and compared: neither their embeddings nor all scores are
    ever held.
    """
    system = _System(stages, defense, "queries/identification")
    others = _System(stages, defense, "queries/distractors")

    def compute(resume: Path, report: Report) -> dict[str, Tensor]:
        faces, victims = open_distractors(stages), stages.splits.victims
        named_victims = {telling_name(name) for name in victims.used_names} - {None}
        who, embedded = sought(stages), system.embed(victims.images)
        probes, enrolled = embedded[who.probes], system.stored(embedded[who.gallery])
        labels = victims.labels[who.probes], victims.labels[who.gallery]
        alone = search(probes, labels[0], enrolled, labels[1], compare=system.compare, chunk=system.chunk)
        sizes = torch.tensor(_sizes(len(faces)))
        draws = stages.streams.generator("identification/distractors")
        size_of = torch.searchsorted(sizes, torch.randperm(len(faces), generator=draws), right=True)

        def work(images: Tensor, rows: Tensor) -> dict[str, Tensor]:
            them = FaceSet(images, torch.zeros(len(images), dtype=torch.int64), ("",))
            named = np.array(
                [telling_name(faces.name(int(label))) in named_victims for label in faces.labels[rows.numpy()]],
                dtype=bool,
            )
            kept = torch.from_numpy(~(them.among(victims.images) | stages.learnt(them) | named))
            images, rows = images[kept], rows[kept]
            best = torch.full((len(sizes), len(probes)), -torch.inf)
            counts = torch.bincount(size_of[rows], minlength=len(sizes))
            if len(images):
                stored = others.stored(others.embed(images, int(rows[0])))
                nobody, everybody = torch.zeros(len(stored)).long(), torch.ones(len(probes)).long()
                for size in size_of[rows].unique().tolist():
                    mine = size_of[rows] == size
                    found = search(
                        probes, everybody, stored[mine], nobody[mine], compare=system.compare, chunk=system.chunk
                    )
                    best[size] = found.other
            return {"best": best, "counts": counts}

        best, counts = torch.full((len(sizes), len(probes)), -torch.inf), torch.zeros(len(sizes), dtype=torch.int64)
        for part in _in_parts(faces, resume, report, work):
            best, counts = torch.maximum(best, part["best"]), counts + part["counts"]
        left_out = torch.tensor(len(faces)) - counts.sum()
        return {"mate": alone.mate, "other": alone.other, "best": best, "counts": counts, "left_out": left_out}

    named = stages.config.data_of("distractors")
    key = system.key(
        victims=stages.data_key,
        seed=stages.config.seed,
        distractors=[named.dataset, fingerprint(named.root), stages.config.options_of("distractors")],
        image_size=stages.config.image_size,
    )
    what = f"search among distractors on {defense.name}"
    return tensor_job(f"search-{defense.name}", key, what, "searches.safetensors", compute, _distracted)


def _distracted(tensors: dict[str, Tensor]) -> Distracted:
    left_out = int(tensors.pop("left_out"))
    return Distracted(**tensors, left_out=left_out)


def measure_distractors(stages: Stages, defense: Defense, plain: Defense) -> tuple[Distractors, list[str]]:
    """Identification of the victims among distractors, protected and plain; and what to warn of."""
    searched = {
        name: stages.do(distracted_job(stages, target))
        for name, target in (("protected", defense), ("unprotected", plain))
    }
    with stages.timed("measure", "measure identification"):
        figures = {name: _large_gallery(stages, found) for name, found in searched.items()}
    found, notes = searched["protected"], []
    if found.left_out:
        notes.append(
            f"distractors: {found.left_out} images are left out, which equal a victim's or one that a recogniser "
            "learns from, bear a victim's name, or cannot be decoded"
        )
    source = stages.config.data_of("distractors").dataset
    return Distractors(source=source, distractors=int(found.counts.sum()), **figures), notes


def _large_gallery(stages: Stages, found: Distracted) -> LargeGallery:
    who, labels = sought(stages), stages.splits.victims.labels
    searches, among = Searches(found.mate, found.other, labels[who.probes]), dict[str, Measure]()
    for best, count in zip(found.best, found.counts.cumsum(0).tolist(), strict=True):
        searches = searches.further(Searches(torch.full_like(best, -torch.inf), best, searches.subjects))
        among[str(count)] = _figures(searches, stages, leave_out=True, withheld=stages.guessed).rank1
    return LargeGallery(
        **_figures(searches, stages, leave_out=True, withheld=stages.guessed)._asdict(),
        **_counts(searches, len(who.gallery)),
        rank1_among=among,
    )
