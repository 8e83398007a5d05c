"""`lightning_callback`: `MIRCallback` for Lightning. Imports Lightning only when called, and never transformers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from modality_integration.models.agreement import from_first
from modality_integration.training.measure import Probe
from modality_integration.training.watch import Watch


def lightning_callback(probe: Probe, *, module: str = "model", **options: Any) -> Any:
    """`MIRCallback` for Lightning: returns a callback for `Trainer(callbacks=[...])`, with the same options.

    module: the attribute of the LightningModule that holds the model for `capture`. Logs to the trainer's loggers.
    ModuleNotFoundError unless `lightning` (or `pytorch_lightning`) is installed.
    """
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

    class MIRLightning(Watch, Callback):
        _restored = False  # from a checkpoint whose weights have not been checked yet

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            step = trainer.global_step
            if not self._restored and (step == 0 or (self.history and step < self.history[-1][0])):
                self.begin()  # a new training run
            value = self.value_at(step)
            if not self.history:
                self._measure(trainer, pl_module)
            elif self._restored and value is not None:
                with _autocast(trainer):
                    self.warn_unless_restored(
                        getattr(pl_module, module), step, value, "the resumed training",
                        "Check that the LightningModule's state_dict contains them and that loading it is strict",
                    )  # fmt: skip
            self._restored = False

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            step = trainer.global_step
            if step % self.every == 0 and step != self.history[-1][0]:  # a step may have several batches
                self._measure(trainer, pl_module)

        @property
        def state_key(self) -> str:
            return f"MIRLightning.{self.name}"

        def state_dict(self) -> dict[str, Any]:
            return self.saved()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            measurements = state_dict["measurements"]
            self.restore(state_dict, measurements[-1][0] if measurements else 0)
            self._restored = True

        def _measure(self, trainer: Any, pl_module: Any) -> None:
            with _autocast(trainer):
                logged = self.measure(getattr(pl_module, module), trainer.global_step)
            self.keep()
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step)
            if from_first(self.plateau()):
                trainer.should_stop = True

    return MIRLightning(probe, **options)


def _autocast(trainer: Any) -> AbstractContextManager[None]:
    """The context in which the trainer runs forward passes."""
    context: AbstractContextManager[None] = trainer.precision_plugin.forward_context()
    return context
