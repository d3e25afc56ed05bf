"""`python evaluate.py metrics`: FID, sFID, Inception score, precision and recall."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from deco_fast import __version__
from deco_fast.cli.parser import checked, not_empty, to_path, whole_number
from deco_fast.errors import UserError
from deco_fast.evaluation.extractors import (
    EXTRACTORS,
    FeatureExtractor,
    check_extractor,
    open_extractor,
)
from deco_fast.evaluation.fingerprint import files_fingerprint
from deco_fast.evaluation.image_sets import ImageSet, open_images
from deco_fast.evaluation.metrics import (
    METRICS,
    ReferenceSet,
    compare,
    evaluate_images,
    needs_rows,
    open_reference,
    parse_metrics,
    rehearse,
)
from deco_fast.evaluation.report import EVALUATIONS, REPORT_FILE, report_folder, write_report
from deco_fast.evaluation.statistics import (
    SetStatistics,
    holds_own_statistics,
    holds_statistics,
)
from deco_fast.sampling.writers import check_writable
from deco_fast.training.distributed import Processes, join_processes

_TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
}


def run(options: argparse.Namespace) -> int:
    """Read or compute the statistics of both sets and compare them; the exit status."""
    if options.images is None and options.save_statistics is None:
        raise UserError("--images is missing: name an npz file or a folder to evaluate")
    if options.images is not None:
        check_writable(options.out or EVALUATIONS, "--out")
    if options.save_statistics:
        check_writable(options.save_statistics.parent, "--save-statistics")
        _check_replaceable(options.save_statistics, options.reference, options.images)
    inputs = [path for path in (options.images, options.reference) if path is not None]
    if options.crop is not None and all(path.is_file() for path in inputs):
        listed = " and ".join(map(str, inputs))
        raise UserError(f"--crop cuts the images of folders, not those of {listed}: leave it out")
    with join_processes(options.device) as processes:
        return _run(options, processes)


def _check_replaceable(path: Path, reference: Path, images: Path | None) -> None:
    """Raise UserError where the statistics would take the place of something else."""
    if not path.exists():
        return
    if reference.exists() and path.samefile(reference):
        what = "is the reference itself"
    elif images is not None and images.exists() and path.samefile(images):
        what = "is what --images names"
    elif not holds_statistics(path):
        what = "exists and holds no statistics"
    elif not holds_own_statistics(path):
        what = "exists and is not by --save-statistics"
    else:
        return
    raise UserError(f"--save-statistics {path} {what}: choose another file")


def _run(options: argparse.Namespace, processes: Processes) -> int:
    # Opened first, so that what is wrong with it is known before the reference is worked on.
    images = None if options.images is None else open_images(options.images, options.crop)
    extractor = open_extractor(options.features, options.weights, processes.device)
    reference = open_reference(options.reference, extractor, options.crop)
    if images is None:
        _reference_statistics(options, reference, extractor, processes)
        return 0
    source = {
        "images": str(options.images),
        "count": len(images),
        "reference": str(options.reference),
        "features": extractor.name,
        "fingerprint": extractor.fingerprint,
        "crop": options.crop,
        "metrics": options.metrics,
        "deco_fast": __version__,
    }
    place: AbstractContextManager[Path | None] = nullcontext()
    if processes.is_main:
        source["files"] = [files_fingerprint(path) for path in (options.images, options.reference)]
        default = f"metrics-{options.images.stem}-{extractor.name}"
        place = report_folder(options.out, default, source)
    with place as folder:
        values = _compare(options, images, reference, extractor, processes)
        if folder is not None:
            write_report(folder, source, values)
            print(f"report            {folder / REPORT_FILE}")
    return 0


def _compare(
    options: argparse.Namespace,
    images: ImageSet,
    opened: ReferenceSet,
    extractor: FeatureExtractor,
    processes: Processes,
) -> dict[str, float]:
    """The metrics, which the main process prints."""
    metrics = None if options.metrics is None else parse_metrics(options.metrics)
    rehearse(images, opened, extractor, metrics, processes.device)
    reference = _reference_statistics(options, opened, extractor, processes)
    found = evaluate_images(images, extractor, processes, options.batch_size, needs_rows(metrics))
    values = compare(found, reference, processes, metrics, progress=processes.is_main)
    if processes.is_main:
        of = "" if extractor.name == "inception" else f" of {extractor.name}"
        titles = _TITLES if not of else _TITLES | {"fid": "Fréchet distance"}
        print(f"{len(images):,} images, features{of or ' of Inception'}")
        for name, value in values.items():
            print(f"{titles[name]:<17} {value:.4f}")
    return values


def _reference_statistics(
    options: argparse.Namespace,
    reference: ReferenceSet,
    extractor: FeatureExtractor,
    processes: Processes,
) -> SetStatistics:
    """The reference's statistics, kept where --save-statistics says."""
    metrics = None if options.metrics is None else parse_metrics(options.metrics)
    found = reference.statistics(extractor, processes, options.batch_size, needs_rows(metrics))
    if options.save_statistics is not None and processes.is_main:
        found.save(options.save_statistics, extractor)
        print(f"statistics of the reference: {options.save_statistics}")
    return found


def add_parser(kinds: Any) -> None:
    """Add the command to the subparsers of `evaluate.py`."""
    metrics = kinds.add_parser(
        "metrics",
        help="FID, sFID, Inception score, precision, recall",
        description="Compare images with a reference as the ADM suite does. Under torchrun the "
        "processes share the work.",
    )
    metrics.add_argument(
        "--images",
        type=to_path,
        metavar="PATH",
        help="an npz file of sample.py --npz, or a folder of images",
    )
    metrics.add_argument(
        "--reference",
        type=to_path,
        required=True,
        metavar="PATH",
        help="the same, or statistics: --save-statistics', a batch of the ADM suite, pytorch-fid's",
    )
    metrics.add_argument(
        "--save-statistics",
        type=to_path,
        metavar="FILE.npz",
        help="keep the statistics of the reference, for the next --reference",
    )
    metrics.add_argument(
        "--features",
        type=checked(check_extractor),
        default="inception",
        metavar="NAME",
        help=f"{', '.join(EXTRACTORS)} (default: %(default)s, of the ADM suite)",
    )
    metrics.add_argument(
        "--weights",
        type=not_empty,
        metavar="FILE",
        help="the extractor's (default: its own download)",
    )
    metrics.add_argument(
        "--metrics",
        type=checked(parse_metrics),
        metavar="LIST",
        help=f"some of {','.join(METRICS)} (default: all that there can be)",
    )
    metrics.add_argument(
        "--crop",
        type=whole_number(1),
        metavar="SIZE",
        help="cut the images of folders to a square as training does",
    )
    metrics.add_argument(
        "--batch-size", type=whole_number(1), default=64, help="(default: %(default)s)"
    )
    metrics.add_argument(
        "--device", default="auto", help="auto, cpu or cuda (default: %(default)s)"
    )
    metrics.add_argument(
        "--out",
        type=to_path,
        metavar="FOLDER",
        help="for the report (default: evaluations/metrics-…)",
    )
    metrics.set_defaults(run=run)
