"""Answers prompts: texts, files of any length, token ids or chats.

    python scripts/run_pa.py --model_path /models/Qwen2.5-7B-Instruct \
        --input_texts book.txt --max_output_length 256 --kv_cache_dtype int8 \
        --rope_scaling '{"rope_type": "yarn", "factor": 4.0}'
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags

from lsjax import cli, inputs, report
from lsjax.checkpoint import checkpoint_bytes
from lsjax.compilation import enable_persistent_cache
from lsjax.errors import UserError
from lsjax.files import check_writable, write_atomically
from lsjax.language_model import LanguageModel, load_settled
from lsjax.notes import note
from lsjax.planning.check import check_memory, longest_here
from lsjax.progress import PrefillBar, byte_bar, character_bar
from lsjax.requests import Request, batches, caches_held
from lsjax.sampling import Sampling
from lsjax.settings import Settings, settle
from lsjax.stop_strings import TextStream
from lsjax.tokenizer import Tokenizer, load_tokenizer

FLAGS = flags.FLAGS

cli.define_model_flags()
flags.DEFINE_multi_string(
    "input_texts", [], "A text, or a UTF-8 file that holds one; further words are further ones."
)
flags.DEFINE_string("input_file", None, "JSON lines, each a list of chat messages.")
flags.DEFINE_multi_string(
    "input_ids", [], "Token ids, as in 1,15043,3186; further words are further prompts."
)
flags.DEFINE_string(
    "max_input_length",
    None,
    "Room for prompts of this many tokens; a longer one is refused. As the longest prompt if not "
    "given; auto for as many as the devices hold.",
)
flags.DEFINE_integer("max_output_length", 256, "Tokens to generate at most.", lower_bound=1)
flags.DEFINE_integer("max_batch_size", None, "Prompts answered together.", lower_bound=1)
flags.DEFINE_bool("is_chat_model", False, "Render prompts with the model's chat template.")
flags.DEFINE_string("chat_template", None, "A Jinja chat template, or a file that holds one.")
flags.DEFINE_string(
    "chat_template_kwargs",
    None,
    "A JSON object of what else the chat template is told, as in '{\"enable_thinking\": false}'.",
)
flags.DEFINE_bool("ignore_eos", False, "Do not stop at an end-of-sequence token.")
flags.DEFINE_string(
    "rope_scaling", None, "JSON as in config.json, off, or auto; config.json's if not given."
)
flags.DEFINE_bool(
    "allow_untrained_length", False, "Run past the length that the model is meant for."
)
flags.DEFINE_integer(
    "prompt_lookup_num_tokens",
    0,
    "Draft this many tokens a step from where the last ones stood before, and verify them at once: "
    "faster where text repeats. Greedy only; 0 for none.",
)
flags.DEFINE_enum(
    "sampling",
    "flags",
    ["flags", "auto"],
    "auto: as generation_config.json suggests, where the flags of sampling do not say otherwise.",
)
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0.0)
flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest; 0 for all.", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest that reach this probability.")
flags.DEFINE_float("min_p", 0.0, "Draw among those this many times as likely as the likeliest.")
flags.DEFINE_float(
    "repetition_penalty", 1.0, "Divides the scores of tokens that have stood before; 1 for none."
)
flags.DEFINE_integer(
    "num_samples", 1, "Answers to each prompt, which is read once for all of them.", lower_bound=1
)
flags.DEFINE_multi_string("stop", [], "A text before which an answer ends; may be given again.")
flags.DEFINE_integer("seed", 0, "Of the draws.")
flags.DEFINE_string("output_json", None, "Write results, figures and configuration here.")


def main(argv: list[str]) -> None:
    enable_persistent_cache()
    given = _given_sampling()
    if FLAGS.output_json:
        check_writable(FLAGS.output_json)
    read = _reader(argv[1:])
    settings = settle(**cli.model_options(), rope_scaling=FLAGS.rope_scaling)
    tokenizer = settings.tokenizer or load_tokenizer(settings.folder)
    ids = read(tokenizer)
    requests = batches(
        settings,
        ids,
        FLAGS.max_output_length,
        max_input_length=_max_input_length(settings, len(ids)),
        max_batch_size=FLAGS.max_batch_size,
        sampling=_sampling(settings, given),
        ignore_eos=FLAGS.ignore_eos,
        allow_untrained_length=FLAGS.allow_untrained_length,
        prompt_lookup_num_tokens=FLAGS.prompt_lookup_num_tokens,
        num_samples=FLAGS.num_samples,
        stop=FLAGS.stop,
    )
    configuration = report.in_force(settings, requests)
    cli.say(report.describe(configuration))
    for text in report.notes(settings, requests):
        note(text)
    check_memory(settings, requests[0])
    model = _load(settings)
    completions = [c for request in requests for c in _answer(model, request)]
    batch = requests[0].count * FLAGS.num_samples
    stats = [completions[i].stats for i in range(0, len(completions), batch)]
    cli.say(report.summary(report.combine(stats)))
    if FLAGS.output_json:
        result = report.as_json(completions, stats, configuration)
        write_atomically(FLAGS.output_json, json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def _given_sampling() -> dict[str, Any]:
    """What the flags of sampling say; those that are not given, by their defaults."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    said = {name: FLAGS[name].value for name in names}
    Sampling(**said)  # refuses what is wrong by itself
    return {n: v for n, v in said.items() if FLAGS.sampling == "flags" or FLAGS[n].present}


def _sampling(settings: Settings, given: dict[str, Any]) -> Sampling:
    base = settings.suggested if FLAGS.sampling == "auto" else Sampling()
    return dataclasses.replace(base, **given)


def _max_input_length(settings: Settings, prompts: int) -> int | None:
    """What the flag says, as a number."""
    given = FLAGS.max_input_length
    if given is None:
        return None
    if given == "auto":
        together = min(FLAGS.max_batch_size or prompts, prompts)
        batch = together * caches_held(FLAGS.num_samples)
        output = FLAGS.max_output_length + FLAGS.prompt_lookup_num_tokens
        length = longest_here(settings, batch, output, FLAGS.allow_untrained_length)
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
    """Reads what the flags name, and returns what turns it into ids once there is a tokenizer."""
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


def _load(settings: Settings) -> LanguageModel:
    with byte_bar("load", checkpoint_bytes(settings.folder, settings.config)) as bar:
        return load_settled(settings, bar.update)


def _answer(model: LanguageModel, request: Request):
    """Answers a batch: a single row as it comes, several when they are done."""
    longest = max(len(p) for p in request.prompts)
    run = model.start(request, PrefillBar(model.config, longest))
    single = len(request.numbers) == 1
    text = TextStream(model.tokenizer, request.stop)
    for new in run:
        if single:
            cli.say(text.push(new[0]), end="")
    if single:
        cli.say(text.flush())
    else:
        for completion in run.completions():
            cli.say(f"--- {completion.prompt_tokens:,} tokens:\n{completion.text}")
    return run.completions()


if __name__ == "__main__":
    sys.exit(cli.run(main, words=True))
