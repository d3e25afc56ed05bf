"""Runs a suite: trains, evaluates and tabulates one run after another, from wherever it stopped.

Under torchrun all processes share every run and every evaluation, one process for each GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from deco_fast.checkpoint import load_checkpoint
from deco_fast.checkpoint.checksums import weights_checksum
from deco_fast.checkpoint.lock import alone_in
from deco_fast.compiling import explain_compile_errors, keep_compiled_code
from deco_fast.errors import UserError
from deco_fast.evaluation.extractors import FeatureExtractor, open_extractor
from deco_fast.evaluation.metrics import (
    Collector,
    check_comparable,
    compare,
    evaluate_images,
    needs_rows,
)
from deco_fast.evaluation.precision_recall import NEIGHBOURS
from deco_fast.evaluation.spectrum import DIT_OUTPUT, measure_spectra, spectral_error
from deco_fast.experiments.folder import SuiteFolder
from deco_fast.experiments.reference import (
    Reference,
    WatchedImages,
    image_energy,
    labelled_batches,
    shuffled,
    suite_reference,
)
from deco_fast.experiments.suite import DATASET, REAL_IMAGES, Evaluation, PlannedRun, Suite
from deco_fast.experiments.table import RunResult, write_tables
from deco_fast.experiments.values import KeptValues, is_evaluated
from deco_fast.models.config import class_config
from deco_fast.models.network import DeCoNetwork
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.run import draw, labels_for
from deco_fast.training.distributed import Processes
from deco_fast.training.initial import InitialWeights, open_initial_weights
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.trainer import Trainer


def run_suite(
    suite: Suite,
    runs: Sequence[PlannedRun],
    folder: Path,
    processes: Processes,
    say: Callable[[str], None],
    table: Sequence[PlannedRun] | None = None,
) -> int:
    """Do what is left to do of a suite.

    Args:
        suite: how to evaluate, and the rows of the table.
        runs: from `plan`, those to do.
        folder: the suite's.
        processes: this process among those that share the work.
        say: tells people.
        table: all runs of the table in its order, of which those that are not to be done stand in
            it where they have finished; None is those to do.

    Returns:
        0, or 128 + the number of the signal that asked to stop; the same call then goes on.

    Raises:
        UserError: a run or an evaluation fails; what was done so far is kept.
    """
    where = SuiteFolder(folder)
    evaluation = suite.evaluation
    for run in runs:  # before hours are spent on the first of them
        if processes.is_main:
            RunFolder(where.run(run), run.config).check(exactly=True)
    extractor = open_extractor(evaluation.features, evaluation.weights, processes.device)
    say(f"reference: {evaluation.reference}")
    reference = suite_reference(evaluation, runs[0].config, extractor, folder, processes)
    _rehearse(evaluation, runs[0], extractor, reference, processes)
    real = []
    if evaluation.reference == DATASET:
        real.append(_real_images(evaluation, runs[0], extractor, reference, where, processes))
    keep_compiled_code()
    table = runs if table is None else table
    results: dict[str, RunResult] = {}

    def add_finished() -> None:
        for run in table:
            if run.name not in results and is_evaluated(where.evaluations, run.name, evaluation):
                found = _finished(run, evaluation, extractor, reference, where)
                results.update({} if found is None else {run.name: found})

    if processes.is_main:
        add_finished()
    for number, run in enumerate(runs, start=1):
        title = f"[{number}/{len(runs)}] {run.row.name}, seed {run.seed}"
        found = processes.from_main(results.get(run.name))
        if found is None:
            status = _train(run, where.run(run), processes, title, say)
            if status is not None:
                return status
            found = _evaluate(run, evaluation, extractor, reference, where, processes)
        say(f"{title}: {_listed(found.values)}")
        results[run.name] = found
        if processes.is_main:
            add_finished()  # by others meanwhile
            listed = [results[run.name] for run in table if run.name in results]
            planned = len(results.keys() | {run.name for run in runs})
            write_tables(suite, [*real, *listed], planned, folder)
    return 0


def _rehearse(
    evaluation: Evaluation,
    run: PlannedRun,
    extractor: FeatureExtractor,
    reference: Reference,
    processes: Processes,
) -> None:
    """See on a few images whether the evaluation is possible, before hours of training.

    Raises:
        UserError: it is not.
    """
    if evaluation.num < processes.world_size:
        raise UserError(
            f"--num {evaluation.num} is less than an image for each of the "
            f"{processes.world_size} processes: draw more, or start fewer"
        )
    few = shuffled(run.config, max(NEIGHBOURS + 1, processes.world_size), seed=0)
    found = evaluate_images(few, extractor, processes)
    drawn = dataclasses.replace(found, count=evaluation.num)
    check_comparable(drawn, reference.statistics, evaluation.metrics)


def _train(
    run: PlannedRun, path: Path, processes: Processes, title: str, say: Callable[[str], None]
) -> int | None:
    """Train to the end, or return the exit status of the signal that stopped it."""
    folder = RunFolder(path, run.config)
    if folder.finished:
        return None
    initial = None
    if run.config.training.init_from is not None and folder.newest_checkpoint() is None:
        initial = open_initial_weights(run.config.training.init_from, run.config.model)
    # Of the run before, with which torch would count this one's as recompilations.
    torch.compiler.reset()
    trainer = Trainer(run.config, folder, processes)
    with alone_in(path) if processes.is_main else nullcontext():
        return _train_alone(trainer, initial, title, say)


def _train_alone(
    trainer: Trainer, initial: InitialWeights | None, title: str, say: Callable[[str], None]
) -> int | None:
    folder, processes = trainer.folder, trainer.processes
    steps = trainer.config.training.steps
    if processes.is_main:
        folder.open()
    processes.barrier()
    passed_over = trainer.resume()
    if initial is not None:
        say(f"{title}: {initial.load(trainer.training)}")
    say(f"{title}: training from step {trainer.step:,} to {steps:,}")
    for line in passed_over or ():
        say(f"{title}: {line}")
    with explain_compile_errors("give --set training.compile=false"):
        interrupt = trainer.run()
    if trainer.step < steps:
        say(f"{title}: saved at step {trainer.step:,}; the same command goes on from there")
        return interrupt.exit_status
    return None


def _evaluate(
    run: PlannedRun,
    evaluation: Evaluation,
    extractor: FeatureExtractor,
    reference: Reference,
    where: SuiteFolder,
    processes: Processes,
) -> RunResult:
    """Draw and compare, or read what was found before."""
    checkpoint, model = _load(run, where, processes.device)
    assert model.card is not None
    kept = _kept(run, model, evaluation, extractor, reference, where)
    values = processes.from_main(kept.read() if processes.is_main else None)
    if values is None:
        labels = labels_for(evaluation.num, class_config(model.config, checkpoint).num_classes)
        numbers = processes.share(evaluation.num)
        collector = Collector(evaluation.num, numbers, processes, needs_rows(evaluation.metrics))
        engine = SamplingEngine(model, model.card.sampling, batch_size=evaluation.batch_size)
        energy = torch.zeros(1)
        for _, images in draw(
            engine,
            labels[numbers.start : numbers.stop],
            numbers,
            seed=evaluation.seed,
            progress=processes.is_main,
        ):
            pixels = images.permute(0, 3, 1, 2)
            energy = energy + len(pixels) * image_energy(pixels)
            collector.add(extractor(pixels.to(processes.device)))
        statistics = collector.finish((model.card.height, model.card.width))
        values = compare(statistics, reference.statistics, processes, evaluation.metrics)
        energy = processes.gather_rows(energy[None]).sum(dim=0) / evaluation.num
        if reference.energy is not None:
            values["spectral_error"] = spectral_error(energy, reference.energy)
        if evaluation.spectrum_images and hasattr(model, "encode"):
            batches = labelled_batches(
                run.config, evaluation.spectrum_images, evaluation.batch_size
            )
            spectra = measure_spectra(model, run.name, batches, device=processes.device)
            shares = [s.high_share for s in spectra if s.signal == DIT_OUTPUT]
            values["dit_high_share"] = sum(shares) / len(shares)
        if processes.is_main:
            kept.write(values)
    return _result(run, model, values)


def _finished(
    run: PlannedRun,
    evaluation: Evaluation,
    extractor: FeatureExtractor,
    reference: Reference,
    where: SuiteFolder,
) -> RunResult | None:
    """What was found before of a run that has finished."""
    try:
        if not RunFolder(where.run(run), run.config).finished:
            return None
        _, model = _load(run, where, torch.device("cpu"))
    except UserError:  # damaged, which is told when it is this one's turn
        return None
    values = _kept(run, model, evaluation, extractor, reference, where).read()
    return None if values is None else _result(run, model, values)


def _load(run: PlannedRun, where: SuiteFolder, device: torch.device) -> tuple[Path, DeCoNetwork]:
    checkpoint = RunFolder(where.run(run), run.config).newest_checkpoint()
    if checkpoint is None:
        raise UserError(f"{where.run(run)} has finished and has no complete checkpoint: delete it")
    return checkpoint, load_checkpoint(checkpoint, "ema", device)


def _kept(
    run: PlannedRun,
    model: DeCoNetwork,
    evaluation: Evaluation,
    extractor: FeatureExtractor,
    reference: Reference,
    where: SuiteFolder,
) -> KeptValues:
    source = {
        "weights_checksum": weights_checksum(model),
        "evaluation": evaluation.model_dump(mode="json"),
        "extractor": extractor.fingerprint,
        "reference": reference.identity,
    }
    return KeptValues(where.evaluations, run.name, source)


def _result(run: PlannedRun, model: DeCoNetwork, values: Mapping[str, float]) -> RunResult:
    return RunResult(run.row.name, run.seed, sum(p.numel() for p in model.parameters()), values)


def _real_images(
    evaluation: Evaluation,
    run: PlannedRun,
    extractor: FeatureExtractor,
    reference: Reference,
    where: SuiteFolder,
    processes: Processes,
) -> RunResult:
    """As many real images as are drawn, compared with all, which they are among.

    So nearer than other images of the same distribution would be: a bound from below.
    """
    source = {
        "evaluation": evaluation.model_dump(mode="json"),
        "extractor": extractor.fingerprint,
        "reference": reference.identity,
    }
    kept = KeptValues(where.evaluations, "real-images", source)
    values = processes.from_main(kept.read() if processes.is_main else None)
    if values is None:
        images = WatchedImages(shuffled(run.config, evaluation.num, evaluation.seed))
        keep_rows = needs_rows(evaluation.metrics)
        found = evaluate_images(images, extractor, processes, evaluation.batch_size, keep_rows)
        values = compare(found, reference.statistics, processes, evaluation.metrics)
        energy = images.energy(processes)
        if reference.energy is not None:
            values["spectral_error"] = spectral_error(energy, reference.energy)
        if processes.is_main:
            kept.write(values)
    return RunResult(REAL_IMAGES, evaluation.seed, None, values)


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
