"""The data block: sources → rows → documents → packs → batches."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.data import DataSection
from fasttrain.core.events import Hooks
from fasttrain.core.interfaces import DataFactory, Examples, LoadedData, PreparedData, Topology
from fasttrain.data import fingerprint
from fasttrain.data.batches import BatchShape, PackedTraining
from fasttrain.data.cache import Tokenized, cache_directory, tokenized
from fasttrain.data.documents import Documents
from fasttrain.data.encode import EncodeOptions, Encoder
from fasttrain.data.evaluation import PackedEvaluation
from fasttrain.data.load import Rows, load_rows
from fasttrain.data.pack import Packer
from fasttrain.data.report import choose_max_length, decode_sample, make_report
from fasttrain.data.template import ChatTemplate
from fasttrain.data.workers import default_workers, encode_rows

PROFILED_DOCUMENTS = 4096


class PackedData(DataFactory):
    """Documents packed into rows of max_length, or one by one."""

    Config = DataSection

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        self._examples = Examples()

    def load(self, *, examples: Examples, seed: int, hooks: Hooks) -> LoadedData:
        self._examples = examples
        return load_rows(self.config, examples=examples, seed=seed, hooks=hooks)

    def prepare(
        self,
        loaded: LoadedData,
        *,
        tokenizer: Any,
        model_max_length: int | None,
        micro_batch_size: int,
        accumulation: int,
        topology: Topology,
        seed: int,
        hooks: Hooks,
    ) -> PreparedData:
        assert isinstance(loaded, Rows), "prepare() takes what load() returned"
        _refuse_unusable(tokenizer)
        max_length = choose_max_length(self.config.max_length, model_max_length)
        template = _template(tokenizer) if loaded.has_conversations else None
        encoder = Encoder(tokenizer, template, self._options(max_length.tokens))
        train = self._tokenize(loaded.train, encoder, "training")
        shape = BatchShape(micro_batch_size, accumulation, topology)
        vocab_size = 1 + max(tokenizer.get_vocab().values())
        training = PackedTraining(
            train.documents,
            self._packer(train.documents, max_length.tokens, seed),
            shape,
            vocab_size=vocab_size,
        )
        held_out, evaluation = None, None
        if loaded.evaluation is not None:
            held_out = self._tokenize(loaded.evaluation, encoder, "held-out")
            evaluation = PackedEvaluation(
                loaded.evaluation,
                held_out.documents,
                self._packer(held_out.documents, max_length.tokens, seed=0),
                shape,
                template,
                vocab_size,
            )
        report = make_report(
            loaded.reports,
            train,
            held_out,
            packs=training.packs(0),
            packed=self.config.packing,
            max_length=max_length,
            sample=decode_sample(tokenizer, train.documents.source(0), *train.documents[0]),
        )
        lengths = _some_lengths(train.documents)
        return PreparedData(training, evaluation, report, lengths, train.fingerprint)

    def _options(self, max_length: int) -> EncodeOptions:
        supervise_all = self.config.train_on_prompts or self._examples.supervise == "all"
        return EncodeOptions(max_length, self.config.overlong, self.config.invalid, supervise_all)

    def _tokenize(self, rows: Dataset, encoder: Encoder, role: str) -> Tokenized:
        """The documents of `rows`, from the cache where they are there. UserError where none is."""
        options, template = encoder.options, encoder.template
        inputs = {
            "rows": fingerprint.of_rows(rows),
            "chat template": fingerprint.of_text(template.text) if template else "none",
            "tokenizer": fingerprint.of_tokenizer(encoder.tokenizer),
            "max_length": str(options.max_length),
            "overlong": options.overlong,
            "invalid": options.invalid,
            "supervised tokens": "all" if options.supervise_all else "answers",
            "fasttrain or a library": fingerprint.of_code(),
        }
        workers = self.config.num_workers or default_workers()
        made = tokenized(
            cache_directory(self.config.cache_dir),
            inputs,
            lambda: encode_rows(rows, encoder, workers=workers),
        )
        if len(made.documents) == 0:
            reasons = [
                f"{count} {reason}"
                for source in dict.fromkeys(name for name, _ in made.tally.dropped)
                for reason, count in made.tally.reasons(source).items()
            ]
            what = f"none of the {len(rows)} {role} rows has anything to learn: "
            what += f"{'; '.join(reasons)}."
            hint = f"data.max_length is {options.max_length}."
            raise UserError(Problem(what, key="data", hint=hint))
        return made

    def _packer(self, documents: Documents, max_length: int, seed: int) -> Packer:
        capacity = max_length if self.config.packing else None
        return Packer(documents.lengths, capacity, self.config.pack_window, seed)


def _refuse_unusable(tokenizer: Any) -> None:
    """A tokenizer may come from a callback or a component of the user's own."""
    if not tokenizer.is_fast:
        what = "the tokenizer is not a fast one; nothing tells where its tokens stand in a text."
        raise UserError(Problem(what, key="tokenizer"))
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no eos_token: no text could be ended."
        raise UserError(Problem(what, key="tokenizer"))


def _template(tokenizer: Any) -> ChatTemplate:
    try:
        return ChatTemplate(tokenizer)
    except ValueError as error:
        what = "the data are conversations and the tokenizer has no chat template."
        hint = "Set it to chatml or to a .jinja file."
        raise UserError(Problem(what, key="tokenizer.chat_template", hint=hint)) from error


def _some_lengths(documents: Documents) -> tuple[int, ...]:
    """Lengths of at most PROFILED_DOCUMENTS documents, spread over all."""
    step = -(-len(documents) // PROFILED_DOCUMENTS)
    return tuple(documents.lengths[::step].tolist())
