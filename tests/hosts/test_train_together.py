"""Two processes that train one model together."""

import json

import numpy as np
import processes
import pytest

import lsjax

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def test_together_they_train_and_write_one_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    ids = [[(7 * i + i * j) % 264 for j in range(33)] for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
    folder = tmp_path / "out"
    flags = [
        f"--config={tmp_path / 'config.json'}", f"--data={tmp_path / 'data.jsonl'}",
        f"--eval_data={tmp_path / 'data.jsonl'}", "--length=32", "--rows=2", "--steps=6",
        "--learning_rate=1e-2", "--mesh=context=2,model=2", f"--output_dir={folder}",
        f"--coordinator_address=localhost:{processes.free_port()}", "--num_processes=2",
    ]  # fmt: skip
    program = processes.ROOT / "scripts" / "train.py"
    both = [processes.start(2, program, *flags, f"--process_id={i}") for i in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert ["done: the model is in" in out for out, _ in said] == [True, False]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    before, after = [line["eval_losses"]["32"] for line in lines if "eval_losses" in line]
    assert after < before
    assert np.mean(lsjax.load(folder / "model").losses(ids)) == pytest.approx(after, rel=1e-5)
