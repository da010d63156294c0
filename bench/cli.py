"""The command line. Heavy imports (torch and what needs it) happen inside the commands: ``--help`` is instant."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import __version__
from bench.errors import BenchError, UsageError
from bench.run.launch import Launch

app = typer.Typer(
    name="bench",
    help="Privacy attack-and-defence benchmark for face recognition.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(name="data", help="Look at, check and pack face data.", no_args_is_help=True)
app.add_typer(data_app)

#: Width of tables where nobody's terminal limits it.
FILE_WIDTH = 120

#: Lists with more columns than this are printed entry by entry.
WIDEST_LIST = 6

out = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
err = Console(stderr=True)

INTERRUPTED = 130

Options = Annotated[
    list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="Option of the defence; repeatable.")
]
AttackOptions = Annotated[
    list[str] | None, typer.Option("-a", metavar="KEY=VALUE", help="Option of the attack; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]

# Settings of a run that `bench run` and `bench sweep` share.
Dataset = Annotated[str | None, typer.Option(help="Dataset (bench list datasets) [default: synthetic].")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder or file of the dataset.")]
Preset = Annotated[str | None, typer.Option(help="quick | cpu | gpu | paper [default: cpu].")]
Backbone = Annotated[str | None, typer.Option(help="Recogniser network (bench list backbones).")]
Head = Annotated[str | None, typer.Option(help="Margin head (bench list heads).")]
ImageSize = Annotated[int | None, typer.Option(help="Height and width of the faces in pixels.")]
EvaluatorFile = Annotated[
    Path | None, typer.Option(help="ONNX recogniser that judges identity leakage; without it one is trained.")
]
Probes = Annotated[int | None, typer.Option(help="Victim images to attack.")]
Queries = Annotated[int | None, typer.Option(help="Intercepted representations per victim image.")]
Device = Annotated[str | None, typer.Option(help="auto | cpu | cuda | cuda:N | mps.")]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Folder for runs and their cache.")]
Utility = Annotated[
    bool | None,
    typer.Option(
        "--utility/--no-utility",
        help="Measure recognition behind the defence; without it the attack alone is run [default: utility].",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=VALUES",
        help="Strength curve over what the attacker spends: data (public faces), k (interceptions per face) or an "
        "axis of the attack (bench list attacks), e.g. data=0.25,0.5,1 or k=8 for 1,2,4,8.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, e.g. training.epochs=8; repeatable."),
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"bench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    defense: Annotated[str | None, typer.Option(help="Defence to test (bench list defenses).")] = None,
    attack: Annotated[str | None, typer.Option(help="Attack to run against it (bench list attacks).")] = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    preset: Preset = None,
    knowledge: Annotated[
        str | None, typer.Option(help="blackbox | whitebox | oracle: what the adversary knows [default: whitebox].")
    ] = None,
    backbone: Backbone = None,
    head: Head = None,
    image_size: ImageSize = None,
    evaluator: EvaluatorFile = None,
    probes: Probes = None,
    queries: Queries = None,
    seed: Annotated[int | None, typer.Option(help="The one seed [default: 0].")] = None,
    device: Device = None,
    out_dir: OutFolder = None,
    utility: Utility = None,
    budget: Budget = None,
    defense_option: Options = None,
    attack_option: AttackOptions = None,
    settings: Settings = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and an estimate; compute nothing.")
    ] = False,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Reuse what earlier runs computed [default: resume].")
    ] = None,
) -> None:
    """Train behind a defence, attack it, and print how well it recognises and what leaks."""
    from bench.run.config import nested, parse_assignments, resolve

    flags = _run_flags(
        settings,
        head,
        defense=defense,
        attack=attack,
        dataset=dataset,
        data_root=data_root,
        preset=preset,
        knowledge=knowledge,
        backbone=backbone,
        image_size=image_size,
        evaluator=evaluator,
        probes=probes,
        queries=queries,
        utility=utility,
        budget=budget,
        seed=seed,
        device=device,
        out=out_dir,
        resume=resume,
        defense_options=parse_assignments(defense_option or [], "-o") or None,
        attack_options=nested(parse_assignments(attack_option or [], "-a"), "-a") or None,
    )
    resolved = resolve(flags, os.environ, config)

    from bench.run.pipeline import Pipeline

    pipeline = Pipeline(resolved, console=err)
    if not Launch.here().leads:
        if not dry_run:
            pipeline.help()
        return
    if dry_run:
        plan = pipeline.plan()
        if as_json:
            _print_json(plan.model_dump_json(indent=2))
        else:
            from reports.terminal import render_plan

            out.print(render_plan(plan))
        return
    result = pipeline.run()
    if as_json:
        _print_json(result.to_json())
    else:
        from reports.terminal import render_result

        out.print(render_result(result, pipeline.directory))


def _run_flags(settings: list[str] | None, head: str | None, **given: Any) -> dict[str, Any]:
    """The settings of a run that were given: those with a flag of their own over those of ``--set``."""
    from bench.run.config import merge, nested, parse_assignments

    given["training"] = {"head": head} if head else None
    flags = {key: value for key, value in given.items() if value is not None}
    return merge(nested(parse_assignments(settings or [], "--set")), flags)


@app.command()
def sweep(
    defenses: Annotated[str | None, typer.Option(metavar="A,B,...", help="Defences to test.")] = None,
    attacks: Annotated[str | None, typer.Option(metavar="X,Y,...", help="Attacks to run against each.")] = None,
    knowledge: Annotated[
        str | None, typer.Option(metavar="RUNG,...", help="What the adversary knows [default: whitebox].")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,...", help="Seeds [default: 0].")] = None,
    engine: Annotated[
        str | None, typer.Option(help="local (this machine) | ray (a Ray cluster) [default: local].")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, e.g. auto or HOST:6379; without it one is started here.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Cells at the same time, each in a process of its own (local) [default: 1].")
    ] = None,
    cpus_per_cell: Annotated[int | None, typer.Option(help="Processor threads of a cell.")] = None,
    gpus_per_cell: Annotated[
        float | None, typer.Option(help="Accelerators of a cell, also a part of one (ray).")
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="New attempts at a cell whose process or machine was lost [default: 2].")
    ] = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    preset: Preset = None,
    backbone: Backbone = None,
    head: Head = None,
    image_size: ImageSize = None,
    evaluator: EvaluatorFile = None,
    probes: Probes = None,
    queries: Queries = None,
    device: Device = None,
    out_dir: OutFolder = None,
    utility: Utility = None,
    budget: Budget = None,
    defense_option: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="[NAME.]KEY=VALUE", help="Option of all defences, or of one; repeatable."),
    ] = None,
    attack_option: Annotated[
        list[str] | None,
        typer.Option("-a", metavar="[NAME.]KEY=VALUE", help="Option of all attacks, or of one; repeatable."),
    ] = None,
    settings: Settings = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings, those of the sweep in a table [sweep].")
    ] = None,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells; compute nothing.")] = False,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Leave finished cells as they are [default: resume]."),
    ] = None,
) -> None:
    """Run every combination of defences, attacks, rungs and seeds; exit code 3 if any of them failed."""
    from bench.sweep.options import read_request
    from bench.sweep.sweep import Sweep
    from reports.terminal import render_sweep

    axes = {"defenses": defenses, "attacks": attacks, "knowledge": knowledge, "seeds": seeds}
    machines = {
        "engine": engine,
        "address": address,
        "jobs": jobs,
        "cpus_per_cell": cpus_per_cell,
        "gpus_per_cell": gpus_per_cell,
        "retries": retries,
    }
    flags = _run_flags(
        settings,
        head,
        dataset=dataset,
        data_root=data_root,
        preset=preset,
        backbone=backbone,
        image_size=image_size,
        evaluator=evaluator,
        probes=probes,
        queries=queries,
        device=device,
        out=out_dir,
        utility=utility,
        budget=budget,
        resume=resume,
    )
    request = read_request(
        {name: value for name, value in (axes | machines).items() if value is not None},
        flags,
        os.environ,
        config,
        defense_options=defense_option,
        attack_options=attack_option,
    )
    asked = Sweep(request, console=err)
    state = asked.plan() if dry_run else asked.run()
    if as_json:
        _print_json(state.to_json())
    else:
        out.print(render_sweep(state))
    if not dry_run and state.count("failed"):
        raise typer.Exit(BenchError.exit_code)


Kind = Literal["defenses", "attacks", "datasets", "backbones", "heads", "metrics"]


@app.command(name="list")
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")], as_json: AsJson = False) -> None:
    """List what can be named on the command line."""
    from bench.commands.catalogue import catalogue

    rows = catalogue(kind)
    if as_json:
        _print_json(json.dumps(rows, indent=2))
        return
    if len(rows[0]) > WIDEST_LIST:
        for row in rows:
            out.print(_entry(row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    out.print(table)


def _entry(row: dict[str, Any]) -> Table:
    """One row of a wide list, a line per column; empty ones are left out."""
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left", title=escape(str(row["name"])))
    table.add_column(style="dim", no_wrap=True, min_width=11)
    table.add_column(overflow="fold")
    for column, value in row.items():
        if column != "name" and value:
            table.add_row(column, escape(str(value)))
    return table


@app.command()
def protect(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Face images, one face each.")],
    defense: Annotated[str, typer.Option(help="Defence (bench list defenses).")],
    out_file: Annotated[Path, typer.Option("--out", help="The .npz file to write.")],
    defense_option: Options = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what the defence draws.")] = 0,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Faces are resized to this, in pixels.")] = 112,
    as_json: AsJson = False,
) -> None:
    """Protect faces as a client would, and write the representations."""
    from bench.commands.protect import protect_files
    from bench.run.config import parse_assignments

    summary = protect_files(
        images,
        out_file,
        defense=defense,
        options=parse_assignments(defense_option or [], "-o"),
        seed=seed,
        image_size=image_size,
    )
    if as_json:
        _print_json(json.dumps(summary, indent=2))
    else:
        shape = "x".join(str(n) for n in summary["shape"])
        out.print(f"{escape(str(out_file))}: {summary['defense']} {shape} float32", highlight=False)


def _bars() -> Any:
    from bench.progress import ProgressBars

    return ProgressBars(err, log=lambda *_, **__: None)


@data_app.command()
def info(
    path: Annotated[
        Path, typer.Argument(help="A folder of identities, an InsightFace folder, a .rec, a .bin or .tar shards.")
    ],
    as_json: AsJson = False,
) -> None:
    """Describe a dataset from its headers."""
    from bench.data.tools.info import info as describe

    with _bars().task("read headers") as report:
        found = describe(path, report=report)
    if as_json:
        _print_json(found.model_dump_json(indent=2))
        return
    table = Table(title=f"{escape(found.path)} ({found.kind})", title_justify="left", box=None, pad_edge=False)
    for column in ("part", "identities", "images", "per identity", "sizes", "pairs"):
        table.add_column(column, overflow="fold")
    for part in found.parts:
        spread = part.images_per_identity
        pairs = f"{part.pairs.pairs} in {part.pairs.folds} folds ({escape(part.pairs.file)})" if part.pairs else "-"
        table.add_row(
            escape(part.name),
            f"{part.identities:,}",
            f"{part.images:,}",
            f"{spread['min']:g} to {spread['max']:g}, median {spread['median']:g}",
            escape(", ".join(f"{size}: {count:,}" for size, count in list(part.sizes.items())[:4])),
            pairs,
        )
    out.print(table)


@data_app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="A folder of identities, an InsightFace folder, a .rec, a .bin or .tar shards.")
    ],
    as_json: AsJson = False,
) -> None:
    """Decode every image and list what is damaged or suspicious; exit code 3 if anything is damaged."""
    from bench.data.tools.verify import verify as check

    with _bars().task("decode images") as report:
        found = check(path, report=report)
    if as_json:
        _print_json(found.model_dump_json(indent=2))
    else:
        for finding in found.findings:
            colour = "red" if finding.severity == "damaged" else "yellow"
            out.print(
                f"[{colour}]{finding.severity}[/] {escape(finding.where)}: {escape(finding.reason)}", soft_wrap=True
            )
        out.print(f"{found.images:,} images checked, {len(found.findings):,} findings")
    if any(finding.severity == "damaged" for finding in found.findings):
        raise typer.Exit(BenchError.exit_code)


@data_app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Folder of identities: folder/identity/image.*")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for train.rec, train.idx, property (and a .bin).")],
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Side of the stored faces in pixels.")] = 112,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Pack a folder of identities into InsightFace files."""
    from bench.data.tools.pack import pack as pack_folder

    with _bars().task("pack images") as report:
        packed = pack_folder(folder, out_dir, image_size=image_size, overwrite=overwrite, report=report)
    if as_json:
        _print_json(packed.model_dump_json(indent=2))
        return
    for where, reason in packed.skipped:
        err.print(f"left out {escape(where)}: {escape(reason)}", style="yellow", soft_wrap=True)
    out.print(
        f"{escape(packed.out)}: {packed.images:,} images of {packed.identities:,} identities, {packed.pairs:,} pairs "
        f"({', '.join(packed.files)})",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of them.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    images: Annotated[bool, typer.Option("--images/--no-images", help="Show faces on the page.")] = True,
    embed_faces: Annotated[
        bool, typer.Option("--embed-faces", help="Show real faces, too; without it only synthetic ones are shown.")
    ] = False,
    benchmarks: Annotated[
        list[Path] | None, typer.Option("--benchmark", help="A file that pytest --benchmark-json wrote; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what runs found as one HTML page without network, Markdown, LaTeX and CSV."""
    from reports.report import write_report

    if embed_faces and not images:
        raise UsageError("--embed-faces and --no-images contradict each other: give one of them")
    _print_files(
        write_report(runs, out_dir, images=images, embed_faces=embed_faces, benchmarks=benchmarks or []), as_json
    )


@app.command()
def leaderboard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of run directories.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder to write to [default: DIR].")] = None,
    as_json: AsJson = False,
) -> None:
    """Show each defence at its worst case over all attacks; only comparable runs stand in one table."""
    from reports.leaderboard import write_leaderboard

    _print_files(write_leaderboard(directory, out_dir or directory), as_json)


def _print_files(files: list[Path], as_json: bool) -> None:
    if as_json:
        _print_json(json.dumps({"files": [str(file) for file in files]}, indent=2))
        return
    for file in files:
        out.print(escape(str(file)), highlight=False, soft_wrap=True)


@app.command()
def baseline(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of them.")],
    out_file: Annotated[Path, typer.Option("-o", "--out", help="The baseline file to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a baseline that is there; its tolerances are kept.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write down what runs measured, for `bench gate`; runs of one cell and several seeds say how much seeds differ."""
    from bench.gate.baseline import make_baseline, read_baseline, write_baseline
    from bench.run.archive import load_runs

    if out_file.exists() and not overwrite:
        raise UsageError(f"{out_file} exists: choose another file, or replace it with --overwrite")
    made = make_baseline(load_runs(runs), read_baseline(out_file) if out_file.exists() else None)
    write_baseline(made, out_file)
    if as_json:
        _print_json(made.to_json())
    else:
        from reports.terminal import render_baseline

        out.print(render_baseline(made, str(out_file)))


@app.command()
def gate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of them.")],
    baseline_file: Annotated[Path, typer.Option("--baseline", help="The file that `bench baseline` wrote.")],
    ignore_options: Annotated[
        bool,
        typer.Option(
            "--ignore-options", help="Hold a run against the cell of the same names, whatever the options (-o, -a)."
        ),
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether runs leak more than their baseline: exit code 0 no, 1 yes (or a broken attack), 4 undecided."""
    from bench.gate.baseline import read_baseline
    from bench.gate.formats import append_summary, workflow_commands, write_junit
    from bench.gate.gate import gate as judge
    from bench.run.archive import load_runs

    report = judge(
        read_baseline(baseline_file), load_runs(runs), name=str(baseline_file), ignore_options=ignore_options
    )
    if junit is not None:
        write_junit(report, junit)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(report):
            sys.stderr.write(line + "\n")
    if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
        append_summary(report, Path(summary_file))
    if as_json:
        _print_json(report.model_dump_json(indent=2))
    else:
        from reports.terminal import render_gate

        out.print(render_gate(report))
    raise typer.Exit(report.exit_code)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run directory.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Show what differs between two runs: settings, machine, and every figure with its interval."""
    from bench.gate.compare import compare as compare_runs
    from bench.run.archive import load_run

    found = compare_runs(load_run(first), load_run(second))
    if as_json:
        _print_json(found.model_dump_json(indent=2))
    else:
        from reports.terminal import render_difference

        out.print(render_difference(found))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    what: Annotated[str, typer.Option(help="recogniser | attack: which of the run's networks.")],
    out_file: Annotated[Path, typer.Option("--out", help="The .onnx file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write a run's recogniser, or its attack's network, as ONNX; onnxruntime has to agree with torch on it."""
    from bench.commands.export import export as export_network

    written = export_network(run, what, out_file)
    if as_json:
        _print_json(written.model_dump_json(indent=2))
        return
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in written.inputs.items())
    use = "; can be an --evaluator" if written.evaluator else ""
    out.print(
        f"{escape(written.file)}: {shapes} -> {written.output}, at most {written.difference:.1g} from torch{use}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what works on this machine, what is missing and how to get it."""
    from bench.commands.doctor import diagnose
    from bench.run.config import known_variables

    checks = diagnose(known_variables=known_variables())
    if as_json:
        _print_json(json.dumps([check.as_dict() for check in checks], indent=2))
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("", "check", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for check in checks:
            status = f"[{colours[check.status]}]{check.status}[/]"
            table.add_row(status, escape(check.name), escape(check.detail), escape(check.remedy or ""))
        out.print(table)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(5)


def _print_json(document: str) -> None:
    sys.stdout.write(document.rstrip("\n") + "\n")


#: The command-line library's usage error; newer versions of typer carry click inside, older ones depend on it.
_CommandLineError: type[Any] = typer.BadParameter.__bases__[0]


def _fail(message: str, code: int) -> NoReturn:
    """One line on stderr, with ``--json`` also the one document on stdout, and the exit code.

    Of several processes the first one speaks; another one only of what went wrong in itself.
    """
    line = " ".join(message.split())
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends the others when one has failed: no more to say
        if code not in (UsageError.exit_code, INTERRUPTED):
            err.print(f"bench (process {rank}): {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(code)
    err.print(f"bench: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if "--json" in sys.argv:
        _print_json(json.dumps({"status": "error", "error": line, "exit_code": code}))
    raise SystemExit(code)


def _explain_os_error(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{where}: free some or choose another folder with --out"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}: choose another folder with --out, or change the file's permissions"
    return f"{error.strerror or error}{where}"


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of ``bench`` and ``ppfr-bench``: every failure is one clear line and its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
    except _CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            raise SystemExit(UsageError.exit_code) from None
        _fail(error.format_message(), UsageError.exit_code)
    except BenchError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader went away (bench list ... | head): nothing left to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        _fail(_explain_os_error(error), BenchError.exit_code)
    except Exception as error:
        if os.environ.get("BENCH_DEBUG"):
            raise
        _fail(
            f"internal error: {type(error).__name__}: {error} (BENCH_DEBUG=1 shows the traceback; please report it)",
            BenchError.exit_code,
        )
    if code == INTERRUPTED:  # the command-line library turns some interrupts into this code itself
        _fail("interrupted; the same command goes on where it stopped", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
