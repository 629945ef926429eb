"""Plans by arithmetic: what fits, how long a text would, what is best, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.deployments import deployment as deployment_of
from helpers.processes import finish, start
from helpers.programs import ROOT, run

import lsjax
from lsjax import UserError
from lsjax.config import LayerKind
from lsjax.families import read_config
from lsjax.planning import find_target
from lsjax.planning.arithmetic import cache_bytes, needs_of
from lsjax.planning.compiled import compile_for
from lsjax.planning.result import fits

CONFIGS = ROOT / "tests" / "golden" / "configs"
GLM = CONFIGS / "glm-4-9b-chat-1m.json"
QWEN = CONFIGS / "Qwen2-72B-Instruct.json"
LLAMA = CONFIGS / "Llama-3.1-70B-Instruct.json"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "target", "length", "options"),
    [
        (GLM, "v5e:2x4", 1_048_576 - 256, {}),
        (GLM, "h100-80gb:1", 1_048_576 - 256, {}),
        (QWEN, "h100-80gb:8", 131_072 - 256, {"rope_scaling": YARN}),
        (LLAMA, "v5p:2x2x2", 131_072 - 256, {}),
    ],
)
def test_what_is_known_to_fit(config, target, length, options):
    plan = lsjax.plan(config, target, max_input_length=length, **options)
    assert plan.fits and plan.max_length == length and plan.limited_by == "positions"
    devices = plan.target.devices
    assert plan.deployment.mesh.size == devices and plan.deployment.kv_cache_dtype == "int8"


def test_int8_weights_are_named_where_they_make_room():
    floats, int8 = (
        lsjax.plan(LLAMA, "h200:1", max_input_length=100_000, weight_dtype=dtype)
        for dtype in ("auto", "int8")
    )
    assert not floats.fits and "--weight_dtype int8" in " ".join(floats.reasons)
    assert int8.fits and int8.deployment.weight_dtype == "int8"
    weights = [plan.programs["decode"].weights for plan in (floats, int8)]
    assert weights[1] == pytest.approx(weights[0] / 2, rel=0.001)


@pytest.mark.parametrize(
    ("target", "batch"),
    [
        ("v5e:2x4", 1), ("l40s:2", 4),
        *(
            pytest.param(*given, marks=pytest.mark.slow("another batch or target is quick"))
            for given in (
                ("v6e:1x1", 4), ("h200:1", 1), ("cpu:8", 4),
            )
        ),
    ],
)  # fmt: skip
def test_the_longest_fits_and_a_little_more_does_not(target, batch):
    config = ROOT / "examples" / "qwen2.5-0.5b.json"
    options = {"max_batch_size": 16 * batch, "allow_untrained_length": True}
    plan = lsjax.plan(config, target, **options)
    assert plan.fits and plan.limited_by == "memory" and plan.length == plan.max_length
    more = needs_of(plan.config, plan.target.platform, plan.deployment, int(1.01 * plan.length))
    assert not fits(plan.target, more)


@pytest.mark.slow("a plan for each format is to the byte, which is quick")
def test_fewer_bits_and_more_devices_take_longer_texts():
    def longest(target, kv):
        options = {"kv_cache_dtype": kv, "allow_untrained_length": True}
        return lsjax.plan(LLAMA, target, **options).max_length

    lengths = [longest("h100-80gb:4", kv) for kv in ("bfloat16", "int8", "int4")]
    assert lengths[1] > 1.9 * lengths[0] and lengths[2] > 1.7 * lengths[1]
    assert longest("h100-80gb:8", "bfloat16") > 2 * lengths[0]


def test_questions_share_a_document_of_a_million_tokens():
    options = {"document_length": 1_044_480, "max_input_length": 3840, "kv_cache_dtype": "int8"}
    one, eight = (lsjax.plan(GLM, "h100-80gb:1", max_batch_size=n, **options) for n in (1, 8))
    assert eight.fits and eight.limited_by == "positions" and eight.max_length == 3840
    caches = [plan.programs["decode"].cache for plan in (one, eight)]
    own = (caches[1] - caches[0]) / 7
    assert own < 0.01 * (caches[0] - own)  # a question's cache against the document's
    document = eight.document
    assert document.saved_bytes == pytest.approx(eight.programs["read"].cache, rel=0.01)
    assert document.load_seconds(2e9) == document.saved_bytes / 2e9
    fit, more = (
        lsjax.plan(GLM, "h100-80gb:1", max_batch_size=n, **options)
        for n in (document.questions, document.questions + 1)
    )
    assert fit.fits and not more.fits
    with pytest.raises(UserError, match="1048832 tokens"):
        lsjax.plan(GLM, "h100-80gb:1", **(options | {"max_input_length": 4096}))


@pytest.mark.slow("plans and runs take their shapes from one function")
@pytest.mark.parametrize("mesh", ["context=2", "model=2"])
def test_a_compressed_cache_is_planned_to_the_byte(mesh):
    """By the arrays of a real run, on all devices together."""
    settings = {"kv_cache_dtype": "int8", "mesh": mesh, "prefill_chunk": 512}
    small = {"induction": 0.5, "echo": 0.0, "window": 256, "window_share": 0.1}
    lm = lsjax.load(kv_compression=small, **settings)
    (answer,) = lm.generate([[1, 2, 3]], 4, max_input_length=16_000, allow_untrained_length=True)
    sizes = tuple(lm.options.mesh.shape.values())
    deployment = deployment_of(sizes, "float32", "int8", 512, 1, 4, lm.options.compression)
    found = cache_bytes(lm.config, "cpu", deployment, 16_000)
    # Every device of the context axis holds its own float tails and compensation tokens.
    assert answer.stats.cache_bytes <= found * lm.options.mesh.size
    assert found * lm.options.mesh.size < 1.2 * answer.stats.cache_bytes


@pytest.mark.slow("what heads keep is tested in tests/compression, and bytes against arrays")
def test_a_compressed_cache_takes_a_third():
    planned = lsjax.plan(GLM, "h100-80gb:1", kv_compression="razor", max_input_length=131_072)
    whole = lsjax.plan(GLM, "h100-80gb:1", max_input_length=131_072)
    share = planned.programs["decode"].cache / whole.programs["decode"].cache
    assert share <= 0.34


def test_a_compressed_document_is_counted_in_layers_of_attention():
    """6 of 32 KV heads keep 131,072 tokens, and the others a fifth of them."""
    settings = {"kv_cache_dtype": "int8", "prefill_chunk": 4096, "max_input_length": 1024}
    whole, kept = (
        lsjax.plan(
            CONFIGS / "Qwen3.5-9B.json",
            "h100-80gb:1",
            kv_compression=c,
            document_length=131_072,
            **settings,
        )
        for c in ("none", "razor")
    )
    less = whole.programs["decode"].cache - kept.programs["decode"].cache
    heads = 26 * 2 * (256 + 2)  # bytes of a token in int8, with scales
    assert less == pytest.approx(heads * 131_072 * 4 / 5, rel=0.01)


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8", "int4"])
def test_a_cache_is_planned_to_the_byte(kv):
    config = read_config(ROOT / "examples" / "qwen2.5-0.5b.json")
    deployment = deployment_of((1, 1, 1), "float32", kv, 512, 1, 64)
    found = cache_bytes(config, "cpu", deployment, 16_000)
    assert found == deployment.cache_spec_for(16_000).nbytes(config)


def test_int4_is_recommended_only_where_int8_does_not_fit():
    def recommended(length):
        plan = lsjax.plan(GLM, "h100-80gb:1", max_input_length=length, allow_untrained_length=True)
        return plan.recommended.kv_cache_dtype, plan.fits

    assert recommended(1_000_000) == ("int8", True)
    assert recommended(2_000_000) == ("int4", True)
    assert recommended(4_000_000)[1] is False


@pytest.mark.parametrize(
    ("config", "target", "paths"),
    [
        ("Qwen3-8B", "l40s:1", ("cuDNN", "cuDNN")),
        ("Qwen3.5-9B", "l40s:1", ("the blockwise loop",) * 2),
        ("Qwen3.5-9B", "h200:1", ("the blockwise loop", "cuDNN")),
        ("Qwen3.5-9B", "v5e:2x4", ("a Pallas kernel",) * 2),
    ],
)
def test_the_path_of_prefill_is_named_as_compiled_and_as_run(config, target, paths):
    config = ROOT / "tests" / "golden" / "configs" / f"{config}.json"
    given = {"kv_cache_dtype": "int8", "prefill_chunk": 4096, "max_input_length": 9}
    planned = lsjax.plan(config, target, **given)
    assert planned.prefill_paths == (paths[1], paths[1])  # nothing was compiled
    assert dataclasses.replace(planned, compiled=True).prefill_paths == paths


@pytest.mark.parametrize(
    ("target", "options", "loop"),
    [
        ("h100-80gb:1", {}, False),
        ("h100-80gb:1", {"prefill_chunk": 5000}, True),
        ("h100-80gb:1", {"document_length": 300_000, "max_input_length": 9}, True),
        ("h100-80gb:2", {"mesh": "context=2"}, True),
        ("v5e:2x4", {}, False),
        ("h100-80gb:1", {"max_input_length": 100_000}, None),
    ],
)
def test_the_loop_that_views_leave_edges_to_is_named(target, options, loop):
    config = ROOT / "tests" / "golden" / "configs" / "Qwen2.5-7B-Instruct-1M.json"
    given = {"kv_cache_dtype": "int8", "prefill_chunk": 4096, "max_input_length": 500_000}
    views = lsjax.plan(config, target, **given | options).prefill_views
    assert (None if views is None else "blockwise loop" in views) == loop


def test_what_was_asked_for_is_planned_and_the_better_one_named():
    plan = lsjax.plan(LLAMA, "h100-80gb:8", mesh="context=8", kv_cache_dtype="bfloat16")
    assert plan.deployment.mesh_text == "context=8" and plan.deployment.kv_cache_dtype == "bfloat16"
    assert plan.recommended.kv_cache_dtype == "int8" and plan.reasons


def test_a_faster_target_is_expected_to_be_faster():
    def speed(target):
        return lsjax.plan(GLM, target, max_input_length=500_000).speed

    slow, fast = speed("a100-80gb:1"), speed("h200:1")
    assert fast.prefill_seconds < slow.prefill_seconds
    assert fast.decode_tokens_per_second > slow.decode_tokens_per_second


def test_sparse_prefill_is_expected_to_be_faster_where_there_is_a_kernel():
    def speed(target, **options):
        return lsjax.plan(GLM, target, max_input_length=1_000_000, **options).speed

    for found in speed("v5e:2x4", mesh="context=8"), speed("h200:1"):
        assert 4 < found.prefill_seconds / found.sparse_prefill_seconds < 1 / 0.05
    assert speed("h200:1", kv_cache_dtype="int4").sparse_prefill_seconds is None


def test_the_scores_by_which_sparse_prefill_chooses_take_memory_and_means_take_cache():
    options = {"max_input_length": 1_000_000, "mesh": "context=1"}
    dense, sparse = (
        lsjax.plan(CONFIGS / "Qwen2.5-7B-Instruct-1M.json", "h100-80gb:1", **options, **given)
        for given in ({}, {"sparse_prefill": 0.1})
    )
    means = 27 * 2 * 4 * 128 * 2 * 1_000_000 / 128  # the first layer has none
    grown = sparse.programs["decode"].cache - dense.programs["decode"].cache
    assert grown == pytest.approx(means, rel=0.01)
    assert sparse.programs["prefill"].temporaries > dense.programs["prefill"].temporaries + 1e8


def test_sparse_prefill_is_not_expected_of_a_model_that_refuses_it():
    scaling = {"rope_type": "dual_chunk", "chunk_size": 32768, "local_size": 100}
    found = lsjax.plan(
        CONFIGS / "Qwen2.5-7B-Instruct.json",
        "v5e:2x4",
        max_input_length=30_000,
        rope_scaling=scaling,
    )
    assert found.speed.sparse_prefill_seconds is None


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("h300:8", {}, "h100-80gb:8, h200:8, a100-80gb:8, l40s:8"),
        ("v5e:8", {}, "v5e:2x4"),
        ("cpu:0", {}, "cpu:8"),
        ("h200:2", {"mesh": "context=4"}, "needs 4 devices, but h200:2 has 2"),
        ("h200:3", {"mesh": "model=3"}, "4 KV heads cannot be split over model=3"),
        ("h200:2", {"mesh": "rows=2"}, "data, context, model"),
        ("h200:2", {"mesh": "data=2"}, "max_batch_size 1 cannot be split over data=2"),
        ("h200:1", {"max_input_length": 2_000_000}, "the model serves 1048576"),
        ("h200:1", {"max_output_length": 1_048_576}, "leaves no room for a prompt"),
        ("h200:1", {"kv_cache_dtype": "int2"}, "float32, bfloat16, int8, int4"),
        ("h200:1", {"dtype": "float16"}, "float32, bfloat16"),
        (
            "h200:1",
            {"sparse_prefill": 0.1, "kv_cache_dtype": "int4"},
            "no kernel for int4 on a GPU",
        ),
    ],
)
def test_what_is_impossible_is_refused_with_what_is_possible(target, options, words):
    with pytest.raises(UserError) as caught:
        lsjax.plan(GLM, target, **options)
    assert words in str(caught.value)


def test_the_program_tells_and_writes_its_figures(tmp_path):
    files = [f"--output_json={tmp_path / 'plan.json'}", f"--plot={tmp_path / 'plan.png'}"]
    done = run("plan.py", f"--config={GLM}", "--target=v5e:2x4", *files)
    assert done.returncode == 0, done.stderr
    assert "1,048,320 tokens" in done.stdout and "--mesh context=" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["max_length"] == 1_048_320
    assert found["recommended"]["kv_cache_dtype"] == "int8"
    for program in ("prefill", "decode"):
        of = found["programs"][program]
        assert of["total"] == of["weights"] + of["cache"] + of["temporaries"] < of["capacity"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_targets_compiler_the_extra_that_has_it_is_named():
    done = run("plan.py", f"--config={GLM}", "--target=h200:1", "--compile")
    assert done.returncode == 2 and "pip install 'lsjax[ahead]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_run_pa_refuses_what_cannot_fit_before_it_loads():
    prompts = ["--input_ids=5,6"] * 400
    flags = ["--max_input_length=4000000", "--allow_untrained_length", "--max_output_length=4"]
    done = run("run_pa.py", *prompts, *flags)
    assert done.returncode == 2
    assert "prompts of at most" in done.stderr and "--max_batch_size 1" in done.stderr
    assert "load" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_run_pa_makes_room_for_what_the_model_serves():
    scaling = '--rope_scaling={"rope_type": "yarn", "factor": 4, '
    scaling += '"original_max_position_embeddings": 512}'
    flags = ["--max_input_length=auto", "--max_output_length=48", "--input_ids", "5,6,7", scaling]
    done = run("run_pa.py", *flags)
    assert done.returncode == 0 and "prompt     3 tokens" in done.stdout, done.stderr
    too_long = ",".join(["5"] * 2001)
    done = run("run_pa.py", "--max_input_length=auto", "--max_output_length=48",
               "--input_ids", too_long, scaling)  # fmt: skip
    assert done.returncode == 2 and "max_input_length is 2000" in done.stderr


def test_arithmetic_is_near_what_the_compiler_says():
    config = read_config(ROOT / "examples" / "qwen2.5-0.5b.json")
    config = dataclasses.replace(config, layers=(LayerKind(),))
    deployment, length = deployment_of((1, 1, 1), "float32", "int8", 512, 1, 64), 262_144
    compiled = compile_for(config, find_target("cpu:1"), deployment, length)
    arithmetic = needs_of(config, "cpu", deployment, length)
    assert compiled.keys() == arithmetic.keys()
    for program, needs in compiled.items():
        assert arithmetic[program].total == pytest.approx(needs.total, rel=0.1), program


@pytest.mark.slow("that the compiler and arithmetic agree is tested without a run")
def test_a_real_run_on_a_cpu_takes_what_was_said():
    layers, length, kv, chunk = 1, 262_144, "int8", 2048
    program = Path(__file__).with_name("resident.py")
    config = ROOT / "examples" / "qwen2.5-0.5b.json"
    done = finish(
        start(program, config, layers, length, kv, chunk, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    )
    assert done.returncode == 0, done.stderr
    grown, compiled, arithmetic = json.loads(done.stdout)
    assert compiled == pytest.approx(grown, rel=0.1)
    assert arithmetic == pytest.approx(grown, rel=0.1)
