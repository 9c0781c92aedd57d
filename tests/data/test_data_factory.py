"""The data block as a run uses it: files in, batches and a report out."""

import json
from contextlib import closing

import chats
import numpy as np
import pytest
from row_sets import chat, dataset, rows
from transformers import PreTrainedTokenizerFast

from fasttrain.config.errors import UserError
from fasttrain.config.schema.data import DataSection, FileSourceConfig
from fasttrain.core.events import Hooks
from fasttrain.core.interfaces import Examples, Topology
from fasttrain.data.factory import PackedData

CHATS = [chat("Answer yes or no.", "yes", f"Is it {number}?", "no") for number in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def section(**options):
    path = options.pop("path", "unused.jsonl")
    source = FileSourceConfig(type="file", path=str(path))
    return DataSection(sources=(source,), **{"max_length": 128, **options})


def prepare(loaded, *, family=chats.CHATML, tokenizer=None, examples=None, **options):
    factory = PackedData(section(**options))
    if examples is not None:
        factory._examples = examples
    return factory.prepare(
        loaded,
        tokenizer=tokenizer or chats.tokenizer(family),
        model_max_length=64,
        micro_batch_size=2,
        accumulation=1,
        topology=Topology(),
        seed=1,
        hooks=Hooks(),
    )


def first_step(prepared):
    with closing(prepared.train.stream(0, 0)) as stream:
        return next(stream)


def test_from_a_file_to_batches(tmp_path):
    path = tmp_path / "train.jsonl"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(12)))
    factory = PackedData(section(path=path, max_length=64))
    loaded = factory.load(examples=Examples(), seed=0, hooks=Hooks())
    tokenizer = chats.tokenizer(chats.CHATML)
    prepared = factory.prepare(
        loaded,
        tokenizer=tokenizer,
        model_max_length=None,
        micro_batch_size=2,
        accumulation=1,
        topology=Topology(),
        seed=1,
        hooks=Hooks(),
    )
    report = prepared.report
    assert report.documents == 12 and report.sources[0].used == 12
    [batch] = first_step(prepared).micro_batches
    learnt = tokenizer.decode(batch.labels[batch.supervised_index])
    assert learnt == "yes<|im_end|>" * len(batch.layout.lengths)


def test_the_report_says_what_there_is():
    train, held_out = dataset(chats=CHATS), dataset(chats=CHATS[:4], source="held_out.jsonl")
    prepared = prepare(rows(train, held_out))
    report, documents = prepared.report, prepared.train.documents
    assert report.documents == 40 and report.eval_documents == 4
    assert report.tokens == documents.num_tokens == sum(prepared.profile_lengths)
    answers = len(chats.tokenizer(chats.CHATML).encode("yes<|im_end|>no<|im_end|>"))
    assert report.eval_supervised_tokens == 4 * answers
    assert report.packs == len(prepared.train.packs(0))
    assert report.waste == pytest.approx(1 - report.tokens / (report.packs * 128))
    assert report.longest_document == max(prepared.profile_lengths)
    assert report.max_length_reason == "data.max_length, beyond the model's limit of 64"


def test_the_sample_shows_what_is_learnt():
    sample = prepare(rows(dataset(chats=CHATS))).report.sample
    assert sample.source == "train.jsonl"
    assert [text for text, supervised in sample.pieces if supervised] == [
        "yes<|im_end|>",
        "no<|im_end|>",
    ]
    whole = "".join(text for text, _ in sample.pieces)
    assert whole.startswith("<|im_start|>user\nAnswer yes or no.<|im_end|>\n")


@pytest.mark.parametrize(
    ("given", "model", "length", "reason"),
    [
        (None, 64, 64, "the model's limit"),
        (None, 131072, 8192, "the default; the model's limit is 131072"),
        (None, None, 8192, "the default: the model names no limit"),
        (32, 64, 32, "data.max_length"),
    ],
)
def test_max_length_and_its_reason(given, model, length, reason):
    factory = PackedData(section(max_length=given))
    report = factory.prepare(
        rows(dataset(texts=["Paris"])),
        tokenizer=chats.tokenizer(chats.CHATML),
        model_max_length=model,
        micro_batch_size=1,
        accumulation=1,
        topology=Topology(),
        seed=0,
        hooks=Hooks(),
    ).report
    assert (report.max_length, report.max_length_reason) == (length, reason)


def test_losses_are_counted_by_source():
    train = dataset(chats=[*CHATS, chat("long " * 200, "yes")], texts=["Paris " * 300])
    held_out = dataset(texts=["Rome", "Rome " * 300], source="held_out.jsonl")
    report = prepare(rows(train, held_out), overlong="truncate").report
    first, second = report.sources
    assert (first.rows, first.used, first.truncated) == (42, 41, 1)
    assert first.dropped == {"nothing left to learn within max_length (first: train.jsonl:41)": 1}
    assert (second.used, second.truncated, dict(second.dropped)) == (2, 1, {})
    assert report.documents == 41


def test_nothing_to_learn_at_all_is_the_users_mistake():
    train = dataset(chats=[chat("long " * 200, "yes")] * 4)
    with pytest.raises(UserError) as caught:
        prepare(rows(train))
    assert str(caught.value) == (
        "data: none of the 4 training rows has anything to learn: 4 nothing left to learn within "
        "max_length (first: train.jsonl:1). data.max_length is 128."
    )
    good = dataset(chats=CHATS)
    with pytest.raises(UserError, match="none of the 4 held-out rows"):
        prepare(rows(good, train))


def test_every_token_of_a_causal_run_is_learnt():
    loaded = rows(dataset(chats=CHATS))
    causal = prepare(loaded, examples=Examples(supervise="all")).report
    assert causal.supervised_tokens == causal.tokens - causal.documents
    assert prepare(loaded, train_on_prompts=True).report.supervised_tokens == (
        causal.supervised_tokens
    )
    assert prepare(loaded).report.supervised_tokens < causal.supervised_tokens / 2


def test_unpacked_nothing_is_empty():
    report = prepare(rows(dataset(chats=CHATS)), packing=False).report
    assert report.packs == 40 and report.waste == 0


def test_a_tokenizer_without_a_chat_template_is_the_users_mistake():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chats.tokenizer(chats.CHATML).backend_tokenizer, eos_token="<|im_end|>"
    )
    with pytest.raises(UserError, match=r"tokenizer.chat_template: .*chatml"):
        prepare(rows(dataset(chats=CHATS)), tokenizer=tokenizer)
    assert prepare(rows(dataset(texts=["Paris"])), tokenizer=tokenizer).report.documents == 1


def test_a_tokenizer_without_eos_is_the_users_mistake():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=chats.byte_level())
    with pytest.raises(UserError, match="tokenizer: the tokenizer has no eos_token"):
        prepare(rows(dataset(texts=["Paris"])), tokenizer=tokenizer)


def test_prompts_carry_the_template():
    held_out = dataset(chats=CHATS[:3], texts=["Paris is in France"], source="held_out.jsonl")
    evaluation = prepare(rows(dataset(chats=CHATS), held_out)).evaluation
    assert evaluation is not None
    pairs = evaluation.prompts(4)
    assert pairs[0][0].endswith("<|im_start|>user\nIs it 0?<|im_end|>\n<|im_start|>assistant\n")
    assert pairs[0][1] == "no"
    assert pairs[3] == ("Paris is in", " France")
    assert len(evaluation.prompts(100)) == 4


def test_a_small_data_set_is_one_short_step():
    prepared = prepare(rows(dataset(chats=CHATS[:1])))
    assert prepared.train.steps_in_epoch(0) == 1
    [batch] = first_step(prepared).micro_batches
    assert len(batch.layout.lengths) == 1


def another_template(family):
    return chats.Family(family.template.replace("\n", "\n\n"), family.special, family.eos)


def test_the_second_run_finds_the_tokens():
    loaded = rows(dataset(chats=CHATS))
    first, second = prepare(loaded), prepare(loaded)
    assert first.report.cache.startswith("miss") and second.report.cache.startswith("hit")
    assert np.array_equal(first.train.documents.tokens, second.train.documents.tokens)
    assert first.report.sources == second.report.sources


def test_a_change_is_seen_and_named():
    loaded = rows(dataset(chats=CHATS))
    prepare(loaded)

    def cache_line(loaded=loaded, **options):
        return prepare(loaded, **options).report.cache

    changed = "miss: changed since before: "
    assert cache_line(family=another_template(chats.CHATML)).startswith(changed + "chat template;")
    more = chats.Family(chats.CHATML.template, (*chats.CHATML.special, "<|new|>"), "<|im_end|>")
    assert cache_line(family=more).startswith(changed + "tokenizer;")
    assert cache_line(max_length=127).startswith(changed + "max_length;")
    assert cache_line(overlong="drop").startswith(changed + "overlong;")
    assert cache_line(train_on_prompts=True).startswith(changed + "supervised tokens;")
    other = rows(dataset(chats=[*CHATS[:-1], chat("Answer yes or no!", "yes")]))
    assert cache_line(other).startswith(changed + "rows;")
    assert cache_line().startswith("hit")
    # What only orders documents is not part of it.
    assert cache_line(packing=False, pack_window=7, num_workers=2).startswith("hit")


def test_the_rows_count_and_not_how_they_are_stored():
    """Rows chosen out of a larger table are the same rows."""
    table = dataset(chats=[chat("x", "y"), *CHATS, chat("y", "z")])
    chosen = table.select(range(1, 41)).remove_columns("origin")
    chosen = chosen.add_column("origin", [f"train.jsonl:{n + 1}" for n in range(40)])
    prepare(rows(dataset(chats=CHATS)))
    assert prepare(rows(chosen)).report.cache.startswith("hit")
    # Calls that set padding or truncation on the way leave the tokenizer what it is.
    tokenizer = chats.tokenizer(chats.CHATML)
    tokenizer("a", truncation=True, max_length=3)
    assert prepare(rows(chosen)).report.cache.startswith("hit")
