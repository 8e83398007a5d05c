"""Log rows: MIR's are separate, and the trainer's rows are unchanged, whatever a subclass adds or removes."""

import pytest
from transformers import Trainer

from integration.tiny_models import LAYERS
from integration.tiny_trainers import own_rows, probe_of, trainer_of
from modality_integration import MIRCallback

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "evaluated": True, "metric_for_best_model": "mir"}


class Averaging(Trainer):
    """Like TRL's trainers: adds to each row the means of the values since the last row, and resets them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.seen.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    def log(self, logs, start_time=None):
        if self.seen:
            logs["mean_seen"], logs["seen"] = sum(self.seen) / len(self.seen), len(self.seen)
        super().log(logs, start_time)
        self.seen.clear()


class Counting(Trainer):
    """Adds a running number to each row."""

    rows = 0

    def log(self, logs, *args):
        self.rows += 1
        super().log({**logs, "row": self.rows}, *args)


@pytest.mark.parametrize("logging_steps", [1, 2, 3])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", [Trainer, Averaging, Counting])
@pytest.mark.parametrize("evaluating", [{}, EVALUATING], ids=["trained", "evaluated"])
def test_every_row_of_the_trainer_is_what_it_is_without_the_callback(tmp_path, kind, every, logging_steps, evaluating):
    changes = {"kind": kind, "logging_steps": logging_steps, "greater_is_better": False, **evaluating}
    plain = trainer_of(tmp_path, **{**changes, "metric_for_best_model": None})
    plain.train()
    watched = trainer_of(tmp_path, **changes)
    callback = MIRCallback(probe_of(watched), every=every).attach(watched)
    watched.train()
    assert own_rows(watched) == own_rows(plain)
    assert len(own_rows(plain)) > 6 // logging_steps
    rows = [row for row in watched.state.log_history if "mir" in row]
    assert [row["step"] for row in rows] == [step for step, _ in callback.history] == list(range(0, 7, every))
    layers = [f"mir/layer_{k:02}" for k in range(1, LAYERS + 1)]
    assert all(set(row) == {"mir", *layers, "mir_seconds", "epoch", "step"} for row in rows)
