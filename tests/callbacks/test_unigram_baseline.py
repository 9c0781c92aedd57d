"""The unigram model, against a hand count."""

import math

import pytest
import torch
from fake_run import LettersHeldOut, LettersTrain, evaluation, make_run, report

from fasttrain.callbacks.unigram_baseline import UnigramBaseline, unigram_loss
from fasttrain.config.errors import UserError
from fasttrain.runtime import log

# Targets in training: a once, b twice, c three times; plus one each of 27 letters: 33 in all.
# Held out are two b and three c.
BY_HAND = -(2 * math.log(3 / 33) + 3 * math.log(4 / 33)) / 5


def test_add_one_smoothing_by_hand():
    counts = LettersTrain().token_counts(27)
    assert unigram_loss(counts, LettersHeldOut()) == pytest.approx(BY_HAND, rel=1e-12)


def test_an_unseen_token_is_unlikely_not_impossible():
    counts = torch.zeros(27, dtype=torch.int64)
    assert unigram_loss(counts, LettersHeldOut()) == pytest.approx(math.log(27), rel=1e-12)


def test_it_scores_the_batches_that_an_evaluation_sees():
    counts = LettersTrain().token_counts(27)
    assert unigram_loss(counts, LettersHeldOut(), 1) == pytest.approx(-math.log(3 / 33))


def test_the_summary_says_how_far_below_the_model_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "_output", None)
    run, baseline = make_run(tmp_path), UnigramBaseline()
    baseline.on_data_ready(run, report())
    baseline.on_train_start(run, None)
    assert capsys.readouterr().out == f"a unigram model's held-out loss is {BY_HAND:.3f}\n"
    baseline.on_evaluation_end(run, evaluation(1, BY_HAND + 0.25))
    assert run.summary["unigram"].startswith("the held-out loss is 0.250 nat above")
    baseline.on_evaluation_end(run, evaluation(2, BY_HAND - 0.75))
    assert run.summary == {
        "unigram": f"the held-out loss is 0.750 nat below a unigram model's ({BY_HAND:.3f})"
    }


def test_without_held_out_data_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="unigram_baseline: there are no held-out data"):
        UnigramBaseline().on_data_ready(make_run(tmp_path), report(eval_documents=0))
