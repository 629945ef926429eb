"""The measuring programs, run as a user runs them, on the shipped model."""

import json
import pathlib
import re

import numpy as np
import pytest
from helpers.processes import finish, start
from helpers.programs import run

import lsjax
from lsjax.cli.evals.perplexity import _labeled
from lsjax.evals.cells import Cells, read_cells
from lsjax.evals.needle import NeedleMap
from lsjax.evals.perplexity import Curve

ROOT = pathlib.Path(__file__).parents[2]
QWEN = ROOT / "examples" / "qwen2.5-0.5b.json"
YARN = '{"rope_type": "yarn", "factor": 4.0}'
PNG = b"\x89PNG"


@pytest.mark.slow("needles beside an earlier run's are quick")
def test_needles_by_length_and_depth(tmp_path):
    files = ["--output_json", tmp_path / "map.json", "--plot", tmp_path / "map.png"]
    asked = ["--lengths", "200,600", "--depths", 3, "--keys_per_cell", 2, "--max_batch_size", 3]
    done = run("eval_needle.py", *asked, "--rope_scaling", "auto", *files)
    assert done.returncode == 0, done.stderr
    found = NeedleMap.of(read_cells(str(tmp_path / "map.json")))
    assert found.lengths == (200, 600) and found.depths == (0, 0.5, 1)
    assert found.shares[0] == (1, 1, 1)
    assert "200 tokens  100.0%" in done.stdout
    assert (tmp_path / "map.png").read_bytes().startswith(PNG)


@pytest.mark.slow("density is a sum of counts, which are quick")
def test_density_is_told_by_every_measurement():
    rule = '{"alpha": 0.5, "first_layers": 0, "dense_length": 0, "last_tokens": 128}'
    sparse, text = ["--sparse_prefill", rule], ROOT / "examples" / "passkey_2048.txt"
    tasks = "single needle,multi-key needle"
    for program, asked, words in (
        ("eval_needle.py", ["--lengths", "1800", "--depths", 1], r"1,800 tokens .* density "),
        ("eval_perplexity.py", ["--text_file", text, "--length", 1800], r"config, density "),
        (
            "eval_ruler.py",
            ["--lengths", "1800", "--texts_per_cell", 1, "--tasks", tasks],
            r"1,800 tokens  attended to ",
        ),
    ):
        done = run(program, *asked, *sparse)
        assert done.returncode == 0, done.stderr
        density = float(re.search(words + r"([\d.]+)%", done.stdout)[1])
        assert 30 < density < 95, done.stdout


def test_needles_beside_those_of_an_earlier_run(tmp_path):
    earlier = Cells(str(tmp_path / "earlier.json"))
    earlier.add({"256 0.5 0": True, "512 0.5 0": True, "512 0.5 1": False})
    asked = ["--lengths", "200", "--depths", 1, "--plot", tmp_path / "curves.png"]
    done = run("eval_needle.py", *asked, "--compare", f"before={tmp_path / 'earlier.json'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    done = run("eval_needle.py", *asked, "--compare", "earlier.json")
    assert done.returncode == 2 and "must be label=file" in done.stderr


def test_loss_by_position_for_several_settings(tmp_path):
    files = ["--output_json", tmp_path / "loss.json", "--plot", tmp_path / "loss.png"]
    text = ROOT / "examples" / "passkey_2048.txt"
    settings = ["--rope_scaling", "off", "--rope_scaling", YARN]
    asked = ["--text_file", text, "--length", 2048, *settings, *files]
    done = run("eval_perplexity.py", *asked)
    assert done.returncode == 0, done.stderr
    curves = read_cells(str(tmp_path / "loss.json"))
    assert set(curves) == {"off", YARN}
    assert curves["off"]["ends"][-1] == 2047
    # Within the trained length both foresee the text; far past it only the scaled one does.
    assert curves["off"]["losses"][-1] > 1.5 * curves[YARN]["losses"][-1]
    assert curves[YARN]["perplexity"] < curves["off"]["perplexity"]
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    refused = run("eval_perplexity.py", *asked, "--windows", 1)
    assert refused.returncode == 2 and "another windows (4, not 1)" in refused.stderr
    other = ["--text_file", text, "--length", 2048, "--plot", tmp_path / "both.png"]
    refused = run("eval_perplexity.py", *other, "--compare", f"before={text}")
    assert refused.returncode == 2 and "must be label=file" in refused.stderr


def test_loss_curves_of_runs_have_a_label_each():
    one, two = Curve((1,), (2.0,), 7.4), Curve((1,), (1.0,), 2.7)
    runs = {"before": {"off": one, "auto": two}, "this": {"config": two}}
    assert _labeled(runs) == {"before, off": one, "before, auto": two, "this": two}


@pytest.mark.slow("caches and the comparison of scores are tested by themselves")
def test_what_quantized_caches_change(tmp_path):
    text, file = ROOT / "examples" / "passkey_2048.txt", tmp_path / "cache.json"
    asked = ["--text_file", text, "--length", 1400, "--compare", "int8,int4", "--output_json", file]
    done = run("eval_cache.py", *asked)
    assert done.returncode == 0, done.stderr
    _, *rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["float32", "int8", "int4"]
    assert rows[0][2:] == ["+0.000%", "0.00000", "100.00%"]
    assert 0 < float(rows[1][3]) < float(rows[2][3])
    cells = read_cells(str(file))
    ids = lsjax.load().tokenizer.encode(text.read_text())[:1400]
    np.testing.assert_allclose(
        cells["float32"]["losses"], lsjax.load().token_nll(ids)[0], atol=1e-4
    )
    cells["int8"]["top"] = [-1] * 1399  # which only a run that goes on would print
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cells": cells}))
    assert " 0.00%" in run("eval_cache.py", *asked).stdout


@pytest.mark.slow("what it measures is tested with the shipped models")
def test_the_table_of_scalings(tmp_path):
    lengths, settings = (256, 512), ("none", "alibi")
    files = ["--output_json", tmp_path / "table.json", "--plot", tmp_path / "table.png"]
    asked = [
        "--lengths",
        ",".join(map(str, lengths)),
        *(f"--rope_settings={name}" for name in settings),
    ]
    done = run("eval_shipped.py", *asked, "--keys_per_cell", 2, *files)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "table.json").read_text())
    assert [(c["setting"], c["length"]) for c in cells] == [
        (setting, length) for length in lengths for setting in settings
    ]
    assert cells[0]["share"] == 1 and 1 < cells[0]["perplexity"] < 2 and cells[0]["density"] == 1
    assert "| 256 | 1.00, " in done.stdout
    assert (tmp_path / "table.png").read_bytes().startswith(PNG)
    rule = '{"alpha": 0.5, "first_layers": 0, "dense_length": 0, "sink_blocks": 0}'
    asked = ["--lengths", 1536, "--rope_settings", "yarn", "--keys_per_cell", 1]
    rules = ["--sparse_prefill", "none", "--sparse_prefill", rule]
    done = run("eval_shipped.py", *asked, *rules)
    assert done.returncode == 0, done.stderr
    assert "| tokens | yarn | yarn, alpha 0.5 |" in done.stdout
    assert 60 < float(re.search(r"([\d.]+)% \|", done.stdout)[1]) < 95, done.stdout


@pytest.mark.slow("it measures, and nothing else rests on it")
def test_attention_alone_beside_the_limits_of_the_machine(tmp_path):
    files = ["--output_json", tmp_path / "speed.json", "--plot", tmp_path / "speed.png"]
    asked = ["--decode_lengths", 512, "--prefill_lengths", "64,128", "--repeats", 2]
    asked += ["--heads", 4, "--head_dim", 16, "--devices", 2, "--layers", 3]
    asked += ["--product_size", 256, "--array_size", 10_000]
    done = run("bench_attention.py", *asked, *files)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "speed.json").read_text())
    assert min(found["limits"][name] for name in ("product float32", "read", "copy")) > 0
    limits, decode, compressed, *prefills = found["cases"]
    assert (limits["kind"], decode["kind"], decode["length"]) == ("limits", "decode", 512)
    assert {f["name"] for f in compressed["figures"]} == {
        f"lsjax {dtype}{kind}" for dtype in ("float32", "int8") for kind in ("", " compressed")
    }
    assert all(f["times_whole"] > 0 for f in compressed["figures"] if "compressed" in f["name"])
    assert [(case["kind"], case["length"]) for case in prefills] == [
        ("prefill", 64), ("prefill", 128)
    ]  # fmt: skip
    for case in (decode, *prefills):
        names = {figure["name"] for figure in case["figures"]}
        assert names == {"lsjax float32", "lsjax int8", "jax.nn.dot_product_attention float32"}
        assert all(0 < f["seconds_min"] <= f["seconds_median"] for f in case["figures"])
    # 4 heads of 16 channels, two products, half of them spared by causality.
    figure = prefills[1]["figures"][0]
    assert figure["rate"] * figure["seconds_min"] * 1e9 == pytest.approx(2 * 4 * 16 * 128**2)
    assert "prefill of 128 tokens" in done.stdout
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)


@pytest.mark.slow("the ring's result and its layouts are quick in tests/attention")
def test_the_ring_by_device_count_and_layout(tmp_path):
    files = ["--output_json", tmp_path / "ring.json", "--plot", tmp_path / "ring.png"]
    asked = ["--devices", "1,4", "--lengths", 2048, "--chunk", 1024, "--heads", 2]
    done = run("bench_ring.py", *asked, "--kv_heads", 1, "--sampled_rows", 100, *files)
    assert done.returncode == 0, done.stderr
    alone, zigzag, contiguous = json.loads((tmp_path / "ring.json").read_text())
    for row in (alone, zigzag, contiguous):
        assert row["error"] <= 2 * row["plain_error"]
    assert alone["bytes_sent"] == 0 < zigzag["bytes_sent"]
    assert zigzag["cache_bytes"] == alone["cache_bytes"] / 4
    assert zigzag["busiest_over_mean"] < 1.01 < contiguous["busiest_over_mean"]
    assert (tmp_path / "ring.png").read_bytes().startswith(PNG)


@pytest.mark.slow("a bench, in a process of its own: it dumps what XLA compiles")
def test_what_the_time_goes_to():
    asked = ["--prompt_length", 600, "--output_length", 9, "--kv_cache_dtype", "int8"]
    done = finish(start(ROOT / "scripts" / "bench_profile.py", *asked, devices=1))
    assert done.returncode == 0, done.stderr
    prefill, decode = re.split("decode of a token", done.stdout)
    for program in prefill, decode:
        found = re.findall(r"ms +([\d.]+)%  (.*)", program)
        shares = {part: float(share) for share, part in found}
        assert sum(shares.values()) == pytest.approx(100, abs=0.5)
        assert shares["products of the layers"] > 0
        assert shares["attention: products"] > 0


@pytest.mark.slow("prompt lookup is tested by itself; this is its bench")
def test_prompt_lookup_beside_plain_decoding(tmp_path):
    text = "The door was open. The light was on. " * 20
    asked = ["--input_texts", text, "--output_length", 33, "--repeats", 1]
    file = tmp_path / "lookup.json"
    done = run("bench_lookup.py", *asked, "--prompt_lookup_num_tokens", 5, "--output_json", file)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(file.read_text())
    assert figures["0"]["tokens_per_step"] == 1
    assert figures["5"]["same_tokens"]


@pytest.mark.slow("a bench; the experts are tested by themselves")
def test_experts_beside_a_dense_model():
    done = run("bench_experts.py", "--experts", 4, "--experts_per_token", 2, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    experts, dense, ratio = (float(x) for x in re.findall(r"\d+\.\d+", done.stdout))
    assert ratio == pytest.approx(experts / dense, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench_ring.py", "--devices", "3", "--lengths", "2048"], "must be a multiple of 768"),
        (["bench_ring.py", "--layouts", "striped"], "layouts are zigzag and contiguous"),
        (["bench_lookup.py", "--prompt_lookup_num_tokens", "16"], "0 (no drafts) to 15"),
        (["plan.py", "--config", str(QWEN), "--target", "v9:8"], "h100-80gb:8, h200:8"),
        (
            ["plan.py", "--config", str(QWEN), "--target", "v5e:2x4", "--mesh", "context=16"],
            "has 8",
        ),
        (["eval_needle.py", "--lengths", "512,many"], "--lengths takes numbers of tokens"),
        (["eval_needle.py", "--lengths", "20"], "does not fit 20 tokens"),
        (["eval_needle.py", "--plot", "/nowhere/x.png"], "/nowhere is not a folder"),
        (["eval_perplexity.py", "--text_file", "none.txt", "--length", "9"], "none.txt"),
        (
            ["eval_perplexity.py", "--text_file", str(ROOT / "Makefile"), "--length", "99999"],
            "too few for a length of 99999",
        ),
        (["eval_ruler.py", "--tasks", "chess"], "--tasks takes single needle, "),
        (["eval_ruler.py", "--lengths", "40"], "does not fit 40 tokens"),
        (
            ["eval_cache.py", "--text_file", str(ROOT / "LICENSE"), "--length", "9", "--compare=x"],
            "--compare takes float32",
        ),
        (
            ["eval_cache.py", "--text_file", str(ROOT / "Makefile"), "--length", "99999"],
            "give a longer text",
        ),
        (["eval_shipped.py", "--lengths", "0"], "--lengths takes numbers of tokens"),
        (["eval_shipped.py", "--sparse_prefill", "0.1"], "does not go with ALiBi; leave alibi out"),
        (["bench_attention.py", "--decode_lengths", "x"], "--decode_lengths takes numbers"),
        (["bench_attention.py", "--cache_dtypes", "int9"], "--cache_dtypes takes float32"),
        (["bench_attention.py", "--heads", "3"], "does not divide --heads=3"),
        (["bench_attention.py", "--devices", "99"], "the mesh model=99 needs 99 devices, but 8"),
        (["bench_attention.py", "--devices", "4"], "does not divide --kv_heads=2"),
        (["bench_attention.py", "--torch_python", "/nowhere"], "--torch_python does not start"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow("finding heads, and what they keep, are quick without the programs")
def test_heads_are_found_written_and_used(tmp_path):
    heads, picture = tmp_path / "heads.json", tmp_path / "heads.png"
    asked = ["--token_id_range", "48,57", "--induction", 0.5, "--output", heads, "--plot", picture]
    done = run("find_retrieval_heads.py", *asked)
    assert done.returncode == 0, done.stderr
    assert "2 of 4 KV heads retrieve" in done.stdout
    assert [f"layer   1, KV head   {i}" in done.stdout for i in (0, 1)] == [True, True]
    assert picture.read_bytes().startswith(PNG)
    compression = json.dumps({"heads": str(heads), "induction": 0.5, "window": 200})
    text = ROOT / "examples" / "passkey_2048.txt"
    asked = ["--text_file", text, "--length", 1500, "--rope_scaling", "auto"]
    lines = [
        run("eval_perplexity.py", *asked, "--prompt_length", 1400, *more).stdout
        for more in ([], ["--kv_compression", compression])
    ]
    whole, compressed = (float(line.split()[0]) for line in lines)
    assert abs(compressed / whole - 1) < 0.01
    refused = run("eval_perplexity.py", *asked, "--kv_compression", compression)
    assert refused.returncode == 2 and "teacher_forced_nll" in refused.stderr
    refused = run(
        "find_retrieval_heads.py", "--token_id_range", "57,48", "--output", tmp_path / "no.json"
    )
    assert refused.returncode == 2 and "not in order" in refused.stderr
    assert not (tmp_path / "no.json").exists()
