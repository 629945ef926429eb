"""Answers prompts: texts, files of any length, token ids or chats.

    python scripts/run_pa.py --model_path /models/Qwen2.5-7B-Instruct \
        --input_texts book.txt --max_output_length 256 --kv_cache_dtype int8 \
        --rope_scaling '{"rope_type": "yarn", "factor": 4.0}'
"""

import dataclasses
import functools
import json
from typing import Any

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
from lsjax.documents import check_options
from lsjax.inference.options import Options, resolve_options
from lsjax.inference.request import Request, batches, caches_held
from lsjax.inference.sampling import Sampling
from lsjax.language_model import LanguageModel
from lsjax.planning.check import check_memory, longest_here
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note
from lsjax.runtime.progress import PrefillBar, character_bar
from lsjax.runtime.text_files import check_writable, write_atomically
from lsjax.tokenizer import Tokenizer, load_tokenizer

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_progress_flag()
    define_model_flags()
    flags.DEFINE_multi_string(
        "input_texts",
        [],
        "Prompts: each value is a text, a UTF-8 file, or - for the standard input. Words after the "
        "flags are further prompts.",
    )
    flags.DEFINE_string(
        "input_file", None, "JSON Lines file of chats; each line is a list of messages."
    )
    flags.DEFINE_multi_string(
        "input_ids",
        [],
        "Prompts as token ids, such as 1,15043,3186. Words after the flags are further prompts.",
    )
    flags.DEFINE_string(
        "max_input_length",
        None,
        "Prompt tokens that the cache has room for; longer prompts are refused. Default: the "
        "longest prompt. auto: as many as fit in memory.",
    )
    flags.DEFINE_integer(
        "max_output_length", 256, "Maximum number of tokens to generate.", lower_bound=1
    )
    flags.DEFINE_integer(
        "max_batch_size",
        None,
        "Maximum number of prompts answered together. Default: all of them.",
        lower_bound=1,
    )
    define_document_cache_flags()
    flags.DEFINE_bool("is_chat_model", False, "Render prompts with the model's chat template.")
    flags.DEFINE_string(
        "chat_template", None, "Jinja chat template to use instead of the model's, or a file of it."
    )
    flags.DEFINE_string(
        "chat_template_kwargs",
        None,
        "JSON object of extra variables for the chat template, such as "
        "'{\"enable_thinking\": false}'.",
    )
    flags.DEFINE_bool("ignore_eos", False, "Keep generating past end-of-sequence tokens.")
    define_rope_scaling_flag()
    flags.DEFINE_bool(
        "allow_untrained_length", False, "Allow sequences longer than the model supports."
    )
    flags.DEFINE_integer(
        "prompt_lookup_num_tokens",
        0,
        "Tokens drafted per decode step by looking the last ones up in the text so far, then "
        "verified at once; greedy decoding only. 0 turns it off.",
    )
    flags.DEFINE_enum(
        "sampling",
        "flags",
        ["flags", "auto"],
        "Where sampling parameters come from. flags: from the flags alone. auto: from "
        "generation_config.json, except for flags that are given.",
    )
    flags.DEFINE_float(
        "temperature", 0.0, "Sampling temperature; 0 is greedy decoding.", lower_bound=0.0
    )
    flags.DEFINE_integer(
        "top_k", 0, "Sample among the k most likely tokens; 0 allows all.", lower_bound=0
    )
    flags.DEFINE_float(
        "top_p",
        1.0,
        "Sample among the fewest most likely tokens whose probabilities sum to this; 1 allows all.",
    )
    flags.DEFINE_float(
        "min_p",
        0.0,
        "Sample among tokens at least this fraction as likely as the most likely one.",
    )
    flags.DEFINE_float(
        "repetition_penalty",
        1.0,
        "Penalty on tokens that the prompt or the answer already contains; 1 turns it off.",
    )
    flags.DEFINE_integer(
        "num_samples", 1, "Answers per prompt; the prompt is prefilled once.", lower_bound=1
    )
    flags.DEFINE_multi_string(
        "stop", [], "Text before which an answer ends; repeat the flag for several."
    )
    flags.DEFINE_integer("seed", 0, "Random seed for sampling.")
    flags.DEFINE_string(
        "output_json", None, "File to write results, statistics and the configuration to."
    )


def main(argv: list[str]) -> None:
    enable_persistent_cache()
    given = _given_sampling()
    if FLAGS.output_json:
        check_writable(FLAGS.output_json)
    kept = document_cache_options()
    if FLAGS.document_cache and FLAGS.max_batch_size not in (None, 1):
        raise UserError(
            "--document_cache answers prompts one after the other; leave out --max_batch_size."
        )
    read = _reader(argv[1:])
    options = resolve_options(**model_options(), rope_scaling=FLAGS.rope_scaling)
    if FLAGS.document_cache:
        check_options(options)
    tokenizer = options.tokenizer or load_tokenizer(options.folder)
    ids = read(tokenizer)
    requests = batches(
        options,
        ids,
        FLAGS.max_output_length,
        max_input_length=_max_input_length(options, len(ids)),
        max_batch_size=1 if FLAGS.document_cache else FLAGS.max_batch_size,
        sampling=_sampling(options, given),
        ignore_eos=FLAGS.ignore_eos,
        allow_untrained_length=FLAGS.allow_untrained_length,
        prompt_lookup_num_tokens=FLAGS.prompt_lookup_num_tokens,
        num_samples=FLAGS.num_samples,
        stop=FLAGS.stop,
    )
    configuration = report.effective_config(options, requests)
    say(report.describe(configuration))
    for text in report.warnings(options, requests):
        note(text)
    check_memory(options, requests[0])
    model = load_model(options)
    answer = functools.partial(_answer_from_cache, kept) if FLAGS.document_cache else _answer
    completions = [c for request in requests for c in answer(model, request)]
    batch = requests[0].num_real * FLAGS.num_samples
    stats = [completions[i].stats for i in range(0, len(completions), batch)]
    say(report.summary(report.combine(stats)))
    if FLAGS.output_json:
        result = report.as_json(completions, stats, configuration)
        write_atomically(FLAGS.output_json, json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def _given_sampling() -> dict[str, Any]:
    """Returns the sampling parameters that the flags set; with --sampling=auto only given ones."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    said = {name: FLAGS[name].value for name in names}
    Sampling(**said)  # raises UserError for invalid values
    return {n: v for n, v in said.items() if FLAGS.sampling == "flags" or FLAGS[n].present}


def _sampling(options: Options, given: dict[str, Any]) -> Sampling:
    base = options.suggested if FLAGS.sampling == "auto" else Sampling()
    return dataclasses.replace(base, **given)


def _max_input_length(options: Options, prompts: int) -> int | None:
    """Returns --max_input_length as a number; auto becomes the longest that fits."""
    given = FLAGS.max_input_length
    if given is None:
        return None
    if given == "auto":
        together = min(FLAGS.max_batch_size or prompts, prompts)
        batch = together * caches_held(FLAGS.num_samples)
        output = FLAGS.max_output_length + FLAGS.prompt_lookup_num_tokens
        length = longest_here(options, batch, output, FLAGS.allow_untrained_length)
        if not length:
            raise UserError(
                "max_input_length auto: not even one token fits the devices that are here; "
                "scripts/plan.py --target here says what does."
            )
        return length
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"max_input_length must be a number from 1, or auto, not {given!r}.")
    return int(given)


def _reader(words: list[str]):
    """Reads the inputs that the flags name; returns a function from tokenizer to token ids."""
    given = [n for n in ("input_texts", "input_file", "input_ids") if FLAGS[n].value]
    if len(given) != 1:
        raise UserError(
            "give prompts in one way: --input_texts, --input_file or --input_ids"
            + (f", not {' and '.join(given)} together." if given else "; none is given.")
        )
    if FLAGS.input_ids:
        ids = inputs.read_ids([*FLAGS.input_ids, *words])
        return lambda tokenizer: ids
    template = FLAGS.chat_template and inputs.read_chat_template(FLAGS.chat_template)
    arguments = inputs.read_chat_template_kwargs(FLAGS.chat_template_kwargs or "{}")
    if (template or arguments) and not FLAGS.is_chat_model:
        name = "chat_template" if template else "chat_template_kwargs"
        raise UserError(f"--{name} is used by chat models only; add --is_chat_model.")
    if FLAGS.input_file:
        if words:
            raise UserError(f"{words[0]!r} is not a flag; --input_file takes one file.")
        if not FLAGS.is_chat_model:
            raise UserError("--input_file holds chats; add --is_chat_model.")
        chats = inputs.read_chats(FLAGS.input_file)
    else:
        texts = inputs.read_texts([*FLAGS.input_texts, *words])
        if not FLAGS.is_chat_model:
            return lambda tokenizer: _encode(tokenizer, texts)
        chats = [inputs.as_chat(text) for text in texts]
    return lambda tokenizer: _encode(
        tokenizer,
        [tokenizer.render_chat(c, chat_template=template, arguments=arguments) for c in chats],
        chat=True,
    )


def _encode(tokenizer: Tokenizer, texts: list[str], chat: bool = False) -> list[tuple[int, ...]]:
    with character_bar("tokenize", sum(map(len, texts))) as bar:
        return [
            tuple(tokenizer.encode(text, add_special_tokens=not chat, progress=bar.update))
            for text in texts
        ]


def _answer(model: LanguageModel, request: Request):
    """Answers a batch and prints it: a single row as it is generated, several rows at the end."""
    longest = max(len(p) for p in request.prompts)
    bar = PrefillBar(model.config, longest, model.options.span(longest))
    return print_answers(model, request, model.start(request, bar))


def _answer_from_cache(kept: dict[str, Any], model: LanguageModel, request: Request):
    """Answers one prompt as `_answer`, all but its last token read with the document cache."""
    prompt = request.prompts[0]
    if len(prompt) == 1:
        return _answer(model, request)
    document = read_document(
        model,
        prompt[:-1],
        **kept,
        reserve=request.max_output_length + 1,  # as much as the prompt itself is settled for
        allow_untrained_length=FLAGS.allow_untrained_length,
    )
    request = document.begin(request)
    return print_answers(model, request, model.start(request, document=document))


def program() -> None:
    run_program(main, define_flags, words=True)
