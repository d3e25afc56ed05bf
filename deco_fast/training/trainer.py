"""The training loop: flow matching with the frequency-aware loss (paper section 3).

Every batch of step k and every random number in it depend on (seed, k) alone: a run that stopped
anywhere goes on exactly as if it had not, on any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deco_fast.config import RunConfig
from deco_fast.data.loader import Batch
from deco_fast.errors import UserError, is_out_of_memory
from deco_fast.models.build import empty_network
from deco_fast.models.config import ClassConfig
from deco_fast.sampling.condition_table import Condition
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.images import image_grid, save_grid
from deco_fast.sampling.run import draw, labels_for
from deco_fast.training import state
from deco_fast.training.batches import Batches, open_dataset
from deco_fast.training.distributed import Processes
from deco_fast.training.failure import stop_after_failure
from deco_fast.training.figures import FigureReader, MadeStep, Window
from deco_fast.training.interrupt import Interrupt, catch_interrupt
from deco_fast.training.monitor import Monitor
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.step import TrainingStep, learning_rate
from deco_fast.training.targets import open_features
from deco_fast.training.text import open_text_encoder
from deco_fast.training.time_limit import TimeLimit

# What a checkpoint is assumed to take before one has been written: a slow network disk.
_ASSUMED_BYTES_PER_SECOND = 100e6


class Trainer:
    """One run of a configuration in a folder, from its newest checkpoint if there is one.

    Args:
        config: the run.
        folder: the run's folder, opened.
        processes: this process among those of the run.
        end: stop, with a checkpoint written, before this time of `time.monotonic`.

    Attributes:
        step: steps made.
        training: the network, its average, the optimizer.

    Raises:
        UserError: data or batch size cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        processes: Processes,
        end: float | None = None,
    ) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        self.step = 0
        self.dataset = open_dataset(config, processes)
        self._loader_state: dict[str, Any] | None = None
        features = None
        if config.alignment.enabled:
            features = open_features(config, self.dataset, processes.device)
        self.encode_text = open_text_encoder(config, processes.device)
        self.training = TrainingStep(config, processes, features, self.encode_text)
        parameters = sum(p.numel() for p in self.training.objective.parameters())
        # float32: weights, their average, two moments.
        self.limit = TimeLimit(end, 16 * parameters / _ASSUMED_BYTES_PER_SECOND)

    def resume(self) -> list[str] | None:
        """Go on from the folder's newest checkpoint that is whole; None where there is none.

        Returns:
            A line on each damaged one that was passed over.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        checkpoint, lines = state.choose_checkpoint(self.training, self.folder)
        if checkpoint is None:
            return None
        saved = state.resume(self.training, checkpoint)
        self.step = saved["step"]
        self._loader_state = saved["loader"]
        return lines

    def batches(self) -> Batches:
        """The batches from the present step on."""
        return Batches(self.dataset, self.config, self.processes, self.step, self._loader_state)

    def run(self) -> Interrupt:
        """Train to the configured step, or until a signal or the time limit asks to stop.

        All of these end in a checkpoint, and so do data that cannot be read any more.

        Raises:
            UserError: the loss exploded or is not finite, the data cannot be read, or a checkpoint
                cannot be written.
        """
        config, output = self.config, self.config.output
        self.training.prepare()
        batches = self.batches()
        reader, window = FigureReader(), Window()
        monitor = Monitor(
            self.folder.path,
            config,
            start_step=self.step,
            device=self.processes.device,
            world_size=self.processes.world_size,
            enabled=self.processes.is_main,
        )
        with (
            self._listing_damaged(),
            monitor,
            catch_interrupt(tell=self.processes.is_main) as interrupt,
            closing(self._writer(interrupt)) as writer,
            closing(self.training),
        ):
            failure: UserError | None = None
            batch: Batch | None = None
            while self.step < config.training.steps:
                if batch is None:
                    batch = self._next(batches, window)
                figures = self.training(self.step, batch)
                self.step += 1
                monitor.step()
                for made in reader.push(self.step, batch, figures):
                    self._note(made, window, monitor)
                self.limit.step_made()
                writer.check()
                last = self.step == config.training.steps
                time_is_up = self.limit.is_near
                if not (last or time_is_up or interrupt):
                    try:
                        batch = self._next(batches, window)
                    except UserError as error:
                        failure, interrupt.data_failed = error, True
                stopping = interrupt.agree(self.processes, time_is_up)
                saving = self.step % output.checkpoint_every == 0 or last or stopping
                if saving:
                    # A step that must not be saved has to be known by now.
                    for made in reader.flush():
                        self._note(made, window, monitor)
                    if failure is None and interrupt.data_failed:
                        failure = UserError("another process can read no more of its data")
                    self._save(writer, batches, failure, wait=last or stopping)
                if last or (self.step % output.sample_every == 0 and not stopping):
                    self._show_samples(monitor, interrupt)
                if stopping:
                    break
        if self.processes.is_main:
            self._report_damaged()
            if self.step >= config.training.steps:
                self.folder.mark_finished()
        self.processes.barrier()
        return interrupt

    def _next(self, batches: Batches, window: Window) -> Batch:
        asked = time.perf_counter()
        batch = next(batches)
        window.waited += time.perf_counter() - asked
        return batch

    def _save(
        self,
        writer: state.CheckpointWriter,
        batches: Batches,
        failure: UserError | None,
        *,
        wait: bool,
    ) -> None:
        """Write the checkpoint of this step; all processes call it together.

        Args:
            writer, batches: of this run.
            failure: why the data can be read no more, in this process or another one.
            wait: until it is on the disk, as after a failure.

        Raises:
            UserError: the failure, or too much damage, once the checkpoint is there; or it cannot
                be written.
        """
        # The one before may wait for its disk: no time that a checkpoint takes.
        writer.wait()
        self.processes.barrier()
        began = time.monotonic()
        loader_state = batches.state_dict(self.step)
        failure = failure or batches.excess_of_damage(loader_state)
        try:
            writer.save(self.step, loader_state)
            if self.processes.is_main:
                self._list_damaged()
            if wait or failure is not None:
                writer.wait()
        except UserError as error:
            if failure is None:
                raise
            raise UserError(f"{failure}; {error}") from failure
        self.limit.saved(max(time.monotonic() - began, writer.slowest))
        if failure is not None:
            # Where one leaves, torchrun ends the others, and the first may still be writing.
            self.processes.barrier()
            saved = self.folder.checkpoint(self.step)
            raise UserError(
                f"{failure}; saved {saved}, from which the same command goes on"
            ) from failure

    def _note(self, made: MadeStep, window: Window, monitor: Monitor) -> None:
        """Take in the figures of a step.

        Raises:
            UserError: its loss exploded or is not finite.
        """
        if made.values["tripped"]:
            stop_after_failure(self.training, self.folder, made)
        window.add({name: value for name, value in made.values.items() if name != "tripped"})
        if made.step % self.config.output.log_every == 0 or made.step == self.config.training.steps:
            rate = learning_rate(self.config, made.step - 1)
            monitor.scalars(made.step, {**window.report(), "learning_rate": rate})

    def _must_stop(self, interrupt: Interrupt) -> bool:
        return bool(interrupt) or self.limit.is_near

    def _writer(self, interrupt: Interrupt) -> state.CheckpointWriter:
        return state.CheckpointWriter(
            self.training, self.folder, hurry=lambda: self._must_stop(interrupt)
        )

    def _show_samples(self, monitor: Monitor, interrupt: Interrupt) -> None:
        """A grid of the averaged model's images, always of the same noise and conditions.

        A run goes on without one that cannot be drawn or kept, and stops in the middle of one.
        """

        def check() -> None:
            if self._must_stop(interrupt):
                raise UserError("the run has to stop")

        self.training.ema.wait()
        weights = state.whole_weights(self.training.ema.model, self.training)
        if self.processes.is_main:
            try:
                self._save_samples(weights, monitor, check)
            except (UserError, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0]
                monitor.say(f"no samples of step {self.step:,}: {reason}")

    def _save_samples(
        self, weights: dict[str, Tensor], monitor: Monitor, check: Callable[[], None]
    ) -> None:
        model = empty_network(self.config.model, self.config.card()).eval()
        device = self.processes.device
        weights = {name: tensor.to(device) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
        engine = SamplingEngine(model, encode_text=self.encode_text)
        batches = draw(
            engine, self._sample_conditions(), seed=self.config.training.seed, check=check
        )
        images = torch.cat([images for _, images in batches])
        path = self.folder.path / "samples" / f"step-{self.step:08d}.png"
        save_grid(images, path)
        monitor.images(self.step, torch.from_numpy(np.array(image_grid(images))))
        monitor.say(f"samples: {path}")

    def _sample_conditions(self) -> Sequence[Condition]:
        """The class or prompt of each image of a grid."""
        count, model = self.config.output.sample_count, self.config.model
        if isinstance(model, ClassConfig):
            return labels_for(count, model.num_classes)
        prompts = self.config.text.sample_prompts
        return [prompts[i % len(prompts)] for i in range(count)]

    def _list_damaged(self) -> None:
        """Name in the run's folder what this process knows to be damaged; a full disk may wait."""
        if self.dataset.damage is not None:
            with suppress(UserError):
                self.folder.list_damaged(self.dataset.damage.names())

    @contextmanager
    def _listing_damaged(self) -> Iterator[None]:
        """When too much is damaged, leave its names to whoever shall repair it."""
        try:
            yield
        except UserError:
            self._list_damaged()
            raise

    def _report_damaged(self) -> None:
        if self.dataset.damage is not None and (names := self.dataset.damage.names()):
            listed = self.folder.path / "damaged.txt"
            print(f"{len(names)} damaged files were skipped and listed in {listed}")
