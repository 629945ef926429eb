"""Reads a document once and answers questions about it.

    lsjax-ask --model_path /models/Qwen2.5-7B-Instruct --is_chat_model --document book.txt \
        --question "Who tells the story?" --question "Where does it begin?"

Without --question, questions are read line by line. With --document_cache the document is saved
while it is read: the next run opens it, and goes on where a run that was stopped has left off.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator

from absl import flags

from lsjax.cli import inputs, report
from lsjax.cli.answers import print_answers
from lsjax.cli.flags import (
    define_document_cache_flags,
    define_model_flags,
    define_progress_flag,
    define_rope_scaling_flag,
    document_cache_options,
    model_options,
)
from lsjax.cli.program import run_program, say
from lsjax.cli.reading import load_model, read_document
from lsjax.documents import ChatFrame, Document, chat_frame, check_options
from lsjax.inference.completion import Completion
from lsjax.inference.options import Options, resolve_options
from lsjax.inference.request import batches
from lsjax.language_model import LanguageModel
from lsjax.planning.check import check_memory
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.errors import UserError
from lsjax.runtime.progress import character_bar
from lsjax.runtime.text_files import STDIN, check_writable, write_atomically
from lsjax.tokenizer import Tokenizer, load_tokenizer

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_progress_flag()
    define_model_flags()
    define_rope_scaling_flag()
    flags.DEFINE_string(
        "document",
        None,
        "Document to ask about: a text, a UTF-8 file, or - for the standard input.",
        required=True,
    )
    flags.DEFINE_multi_string(
        "question",
        [],
        "Question about the document; repeat the flag for several, which are answered together. "
        "Default: questions are read line by line.",
    )
    flags.DEFINE_bool(
        "is_chat_model",
        False,
        "Render document and question with the model's chat template, as one message with an "
        "empty line between them. Otherwise the question goes on where the document ends.",
    )
    flags.DEFINE_string(
        "chat_template", None, "Jinja chat template to use instead of the model's, or a file of it."
    )
    flags.DEFINE_integer(
        "max_output_length", 256, "Maximum number of tokens of an answer.", lower_bound=1
    )
    flags.DEFINE_integer(
        "reserve",
        None,
        "Tokens of question and answer that rotary scaling leaves room for, where it depends on "
        "the length. Default: the room up to the trained length, at least 1024 and at most 32768.",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "allow_untrained_length", False, "Allow documents longer than the model supports."
    )
    define_document_cache_flags()
    flags.DEFINE_string("output_json", None, "File to write answers and their statistics to.")


def main(_: list[str]) -> None:
    enable_persistent_cache()
    if FLAGS.output_json:
        check_writable(FLAGS.output_json)
    if FLAGS.document == STDIN and not FLAGS.question:
        raise UserError("- reads the document from the standard input, so give --question too.")
    if FLAGS.chat_template and not FLAGS.is_chat_model:
        raise UserError("--chat_template is used by chat models only; add --is_chat_model.")
    kept = document_cache_options()
    (text,) = inputs.read_texts([FLAGS.document])
    options = resolve_options(**model_options(), rope_scaling=FLAGS.rope_scaling)
    check_options(options)
    tokenizer = options.tokenizer or load_tokenizer(options.folder)
    frame = _frame(tokenizer, text)
    with character_bar("tokenize", len(frame.document)) as bar:
        chat = FLAGS.is_chat_model
        ids = tokenizer.encode(frame.document, add_special_tokens=not chat, progress=bar.update)
    questions = [frame.ask(question) for question in FLAGS.question]
    _check_memory(options, tokenizer, len(ids), questions)
    model = load_model(options)
    document = read_document(
        model,
        ids,
        **kept,
        reserve=FLAGS.reserve,
        allow_untrained_length=FLAGS.allow_untrained_length,
    )
    if questions:
        answers = _answer_together(model, document, questions)
    else:
        answers = _answer_lines(model, document, frame)
    if FLAGS.output_json:
        result = {
            "document_tokens": len(document),
            "answers": [dataclasses.asdict(answer) for answer in answers],
        }
        write_atomically(FLAGS.output_json, json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def _frame(tokenizer: Tokenizer, document: str) -> ChatFrame:
    if not FLAGS.is_chat_model:
        return ChatFrame(document, "", "")
    template = FLAGS.chat_template and inputs.read_chat_template(FLAGS.chat_template)
    return chat_frame(tokenizer, document, template)


def _check_memory(
    options: Options, tokenizer: Tokenizer, document_tokens: int, questions: list[str]
) -> None:
    """Refuses what does not fit, before the weights are loaded."""
    own = [tokenizer.encode(q, add_special_tokens=False) or [0] for q in questions or [""]]
    (request,) = batches(options, own, FLAGS.max_output_length, allow_untrained_length=True)
    check_memory(options, request, document_tokens)


def _lines() -> Iterator[str]:
    """Yields the questions of the standard input."""
    while True:
        if sys.stdin.isatty():
            say("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _answer_lines(model: LanguageModel, document: Document, frame: ChatFrame) -> list[Completion]:
    """Answers the questions of the standard input; one that cannot be answered is not the last."""
    answers = []
    for line in _lines():
        try:
            answers += _answer(model, document, frame.ask(line))
        except UserError as error:
            say(f"error: {error}")
    return answers


def _answer(model: LanguageModel, document: Document, question: str) -> list[Completion]:
    """Answers one question, and prints the answer as it comes."""
    (request,) = model.requests(
        [model.encode_after(document, question)],
        FLAGS.max_output_length,
        document,
        allow_untrained_length=FLAGS.allow_untrained_length,
    )
    return print_answers(model, request, model.start(request, document=document))


def _answer_together(
    model: LanguageModel, document: Document, questions: list[str]
) -> list[Completion]:
    """Answers all questions, and prints the answers: one as it comes, several at the end."""
    if len(questions) == 1:
        answers = _answer(model, document, questions[0])
    else:
        answers = model.generate(
            questions,
            FLAGS.max_output_length,
            document=document,
            allow_untrained_length=FLAGS.allow_untrained_length,
        )
        for question, answer in zip(FLAGS.question, answers, strict=True):
            say(f"--- {question}\n{answer.text}")
    say(report.summary(answers[0].stats))
    return answers


def program() -> None:
    run_program(main, define_flags)
