"""Makes transformers' greedy answers to the demo's questions, in float32 on the CPU:

    python tests/golden/smollm2/make.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs transformers 5.24, torch 2.13 and gguf 0.19. Writes lsjax/shipped/smollm2/transformers.json.
transformers has no NTK scaling of a fixed factor; its effect is another rope_theta, which is set
here.
"""

import copy
import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = pathlib.Path(__file__).parents[3] / "lsjax" / "shipped" / "smollm2"
FACTOR, ANSWER_TOKENS, CHUNK = 1.25, 48, 512


@torch.inference_mode()
def main(path: str) -> None:
    file = pathlib.Path(path)
    given = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**given)
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).eval()
    text = (FOLDER / "war_and_peace.txt").read_text()
    questions = [q["question"] for q in json.loads((FOLDER / "questions.json").read_text())]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{text}\n\n{question}"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in questions
    ]
    dim = model.config.head_dim
    theta = model.config.rope_parameters["rope_theta"] * FACTOR ** (dim / (dim - 2))
    inverse = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    model.model.rotary_emb.inv_freq = inverse.float()
    columns = enumerate(zip(*prompts, strict=False))
    shared = min(i for i, tokens in columns if len(set(tokens)) > 1)
    cache = None
    for at in range(0, shared, CHUNK):
        chunk = torch.tensor([prompts[0][at : min(at + CHUNK, shared)]])
        cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = cache.past_key_values
        print(f"\r{at}", end="", file=sys.stderr)
    answers = []
    for prompt in prompts:
        own, new, margin = copy.deepcopy(cache), prompt[shared:], float("inf")
        ids: list[int] = []
        while len(ids) < ANSWER_TOKENS and model.config.eos_token_id not in ids:
            found = model(torch.tensor([new]), past_key_values=own, use_cache=True)
            first, second = found.logits[0, -1].topk(2).values.tolist()
            margin = min(margin, first - second)
            new = [int(found.logits[0, -1].argmax())]
            ids += new
        answers.append(
            {
                "prompt_tokens": len(prompt),
                "token_ids": ids,
                "smallest_margin": round(margin, 4),
                "text": tokenizer.decode(ids, skip_special_tokens=True),
            }
        )
        print(answers[-1], file=sys.stderr)
    (FOLDER / "transformers.json").write_text(
        json.dumps(answers, indent=1, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1])
