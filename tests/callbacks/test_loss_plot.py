"""loss.png."""

import sys

from fake_run import evaluation, log_record, make_run, result

from fasttrain.callbacks.loss_plot import LossPlot, draw_loss, read_curves
from fasttrain.callbacks.metrics_file import MetricsFile

PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(run):
    metrics = MetricsFile()
    for step, loss in ((10, 3.0), (20, 2.0), (30, float("nan")), (40, 1.5)):
        metrics.on_log(run, log_record(step, loss=loss))
        metrics.on_evaluation_end(run, evaluation(step, loss + 1))


def test_the_picture_is_drawn_when_the_run_ends_without_choosing_a_backend(tmp_path):
    run = make_run(tmp_path, steps_this_process=40)
    write_metrics(run)
    LossPlot().on_run_end(run, result(tmp_path))
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert "matplotlib.pyplot" not in sys.modules


def test_broken_lines_and_losses_that_are_not_finite_are_left_out(tmp_path):
    write_metrics(make_run(tmp_path))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'[1]\n{"step": null, "loss": 1}\n\xff\n{"step": 50, "lo')
    assert read_curves(path) == (([10, 20, 40], [3.0, 2.0, 1.5]), ([10, 20, 40], [4.0, 3.0, 2.5]))


def test_nothing_is_drawn_of_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert not draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    LossPlot().on_run_end(make_run(tmp_path / "absent", steps_this_process=1), result(tmp_path))
    assert not (tmp_path / "loss.png").exists()


def test_a_dry_run_leaves_an_older_picture_alone(tmp_path):
    write_metrics(make_run(tmp_path))
    LossPlot().on_run_end(make_run(tmp_path, steps_this_process=0), result(tmp_path))
    assert not (tmp_path / "loss.png").exists()
