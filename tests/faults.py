"""Faults seeded by hand, each with a quick test that must fail: what the quick tests protect.

python tests/faults.py                 all of them, on a copy of the checkout: a table
python tests/faults.py --only=merge    those whose names hold the word
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = flags.FLAGS
flags.DEFINE_string("only", "", "Runs only the faults whose names hold this.")
flags.DEFINE_integer("jobs", 2, "Faults tried at once.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of one place in the library that a test must notice.

    Attributes:
      name: what goes wrong.
      file: path of the library's file.
      right: what stands there, once.
      wrong: what is put in its place.
      test: pytest's words for the test that must fail: a node id, or a file and -k.
    """

    name: str
    file: str
    right: str
    wrong: str
    test: str


FAULTS = (
    Fault(
        "a norm's factor that multiplies the bias too",
        "lsjax/nn/linear.py",
        """        if factor is not None:
            y = y * factor
        if self.use_bias:
            zeros = nn.with_partitioning(nn.initializers.zeros, self.axes[:1])
            y = y + self""",
        """        if self.use_bias:
            zeros = nn.with_partitioning(nn.initializers.zeros, self.axes[:1])
            y = (y if factor is None else y * factor) + (1 if factor is None else factor) * self""",
        "tests/nn/test_norm.py",
    ),
    Fault(
        "padding that a recurrence runs like a token",
        "lsjax/nn/delta_net.py",
        "        inputs = _first(inputs, counts)",
        "        inputs = _first(inputs, length + 0 * counts)",
        "tests/nn/test_delta_net.py -k padding",
    ),
    Fault(
        "a convolution that goes on after a row's padding",
        "lsjax/nn/delta_net.py",
        "at = counts[:, None] +",
        "at = jnp.max(counts) + 0 * counts[:, None] +",
        "tests/nn/test_delta_net.py -k padding",
    ),
    Fault(
        "a recurrence over tokens in zigzag order",
        "lsjax/nn/delta_net.py",
        "tiled=True)[:, back]",
        "tiled=True)",
        "tests/nn/test_delta_net.py -k transformers",
    ),
    Fault(
        "a refused token of a draft kept in a recurrent state",
        "lsjax/nn/delta_net.py",
        '_, matrix = run_steps(state.arrays["matrix"], _first(inputs, counts))',
        '_, matrix = run_steps(state.arrays["matrix"], _first(inputs, counts + 1))',
        "tests/nn/test_delta_net.py -k refused_token",
    ),
    Fault(
        "heads of 256 channels left to cuDNN on every GPU",
        "lsjax/attention/dispatch.py",
        "return _CUDNN_HEAD_DIM_OF_9 if capability_9 else _CUDNN_HEAD_DIM",
        "return _CUDNN_HEAD_DIM_OF_9",
        "tests/planning/test_plan.py -k path",
    ),
    Fault(
        "a recurrence that goes on from one document of a row to the next",
        "lsjax/nn/delta_net.py",
        "starts = None if since is None else since == 0",
        "starts = None",
        "tests/training/test_recurrent_layers.py -k float64",
    ),
    Fault(
        "a convolution that sees the document before",
        "lsjax/nn/delta_net.py",
        "(since >= width - 1 - i)",
        "(since >= 0)",
        "tests/training/test_recurrent_layers.py -k float64",
    ),
    Fault(
        "head scores given to the first layers, recurrent ones among them",
        "lsjax/compression/razor.py",
        "zip(config.attention_layers, map(tuple, rows.tolist()), strict=True)",
        "enumerate(map(tuple, rows.tolist()))",
        "tests/compression/test_recurrent_layers.py",
    ),
    Fault(
        "the query of gated attention taken for its gate",
        "lsjax/nn/attention.py",
        "q, gate = jnp.split(q, 2, axis=-1)",
        "gate, q = jnp.split(q, 2, axis=-1)",
        "tests/nn/test_golden_logits.py -k qwen3_5",
    ),
    Fault(
        "a zero-centered norm that multiplies by its weight alone",
        "lsjax/nn/linear.py",
        "weight = 1 + weight.astype(jnp.float32)",
        "weight = weight.astype(jnp.float32)",
        "tests/nn/test_golden_logits.py -k qwen3_5",
    ),
    Fault(
        "a shared expert without its gate",
        "lsjax/nn/experts.py",
        "nn.sigmoid(self.shared_gate(x)) * self.shared(x)",
        "0 * self.shared_gate(x) + self.shared(x)",
        "tests/nn/test_golden_logits.py -k qwen3_5_moe",
    ),
    Fault(
        "a recurrence that forgets the tokens of a chunk as if all were its first",
        "lsjax/nn/delta_rule.py",
        "jnp.where(in_state, jnp.exp(total[..., -1:] - total), 0)",
        "jnp.where(in_state, jnp.exp(total[..., -1:]), 0)",
        "tests/nn/test_delta_rule.py",
    ),
    Fault(
        "a token of a recurrence that is read as if its key were the query",
        "lsjax/nn/delta_rule.py",
        "change * jnp.sum(token.k * token.q, axis=-1)",
        "change * jnp.sum(token.k * token.k, axis=-1)",
        "tests/nn/test_delta_rule.py",
    ),
    Fault(
        "matrices that a layer wants in floats rounded to int8",
        "lsjax/nn/int8_weights.py",
        "or path.endswith(floats):",
        "or False:",
        "tests/nn/test_another_layer_kind.py -k counted",
    ),
    Fault(
        "weights counted as read of which a step reads a share",
        "lsjax/planning/arithmetic.py",
        "return config.mlp_of(kind).share_read(name, tokens)",
        "return 1.0",
        "tests/nn/test_another_layer_kind.py -k counted",
    ),
    Fault(
        "chosen experts not renormalized",
        "lsjax/nn/experts.py",
        "if experts.renormalized:",
        "if not experts.renormalized:",
        "tests/nn/test_experts.py",
    ),
    Fault(
        "a token in the group of another expert",
        "lsjax/nn/experts.py",
        "return y[jnp.argsort(order)]",
        "return y[order]",
        "tests/nn/test_experts.py -k transformers",
    ),
    Fault(
        "a row counted in the next expert's gradient as well",
        "lsjax/nn/grouped_product.py",
        "own = jnp.zeros(rows.size, bool)",
        "own = jnp.ones(rows.size, bool)",
        "tests/nn/test_grouped_product.py",
    ),
    Fault(
        "a query of dual chunk attention farther from the chunk before than it was trained for",
        "lsjax/positions/dual_chunk.py",
        "jnp.minimum(place + self.stride, self.size)",
        "place + self.stride",
        "tests/attention/test_dual_chunk.py",
    ),
    Fault(
        "scores past the original length that grow by half",
        "lsjax/positions/dual_chunk.py",
        "+ 1) ** 2",
        "+ 1) ** 1",
        "tests/attention/test_dual_chunk.py",
    ),
    Fault(
        "quantized keys of a later chunk of positions in an earlier one's range",
        "lsjax/cache/float_tail.py",
        "block_begin if step.views == 1 else jnp.minimum(step.end, block_begin)",
        "block_begin",
        "tests/attention/test_dual_chunk.py",
    ),
    Fault(
        "a window's tokens of the lap before in another chunk of positions",
        "lsjax/cache/window.py",
        "slots(oldest, lap, lap - last - sinks)",
        "slots(oldest, lap, oldest - sinks)",
        "tests/compression/test_dual_chunk.py",
    ),
    Fault(
        "a compensation token that counts all dropped tokens for each range of keys",
        "lsjax/cache/window.py",
        "count = token.count_between(step.begin, step.end, self.spec.sinks)",
        "count = None",
        "tests/compression/test_dual_chunk.py",
    ),
    Fault(
        "keys of an earlier chunk of positions in a view of the query's own",
        "lsjax/attention/cudnn.py",
        "begin = 0 if key_range.start is None else key_range.start[0, 0]",
        "begin = 0",
        "tests/attention/test_gpu_kernels.py -k all_see",
    ),
    Fault(
        "a wrong slot in the zigzag",
        "lsjax/distributed/sequence_layout.py",
        "rest - (2 * self.devices - 1 - device) * self.piece_length, 0",
        "rest - (2 * self.devices - 2 - device) * self.piece_length, 0",
        "tests/attention/test_zigzag.py",
    ),
    Fault(
        "a merge weight swapped",
        "lsjax/attention/partial.py",
        "weight_a[..., None] * a.values + weight_b[..., None] * b.values",
        "weight_b[..., None] * a.values + weight_a[..., None] * b.values",
        "tests/attention/test_merge.py",
    ),
    Fault(
        "devices merged by the local running max",
        "lsjax/attention/partial.py",
        "running_max = _finite(jax.lax.pmax(partial.lse, axis_name))",
        "running_max = _finite(partial.lse)",
        "tests/attention/test_cached_attention.py -k mesh",
    ),
    Fault(
        "an int8 value's scale dropped",
        "lsjax/attention/blockwise.py",
        "            weights = weights * factor[:, :, None]",
        "            pass",
        "tests/attention/test_cached_attention.py -k int8",
    ),
    Fault(
        "the scale of int8 weights left out",
        "lsjax/nn/matmul.py",
        "return jax.lax.platform_dependent(x, weight, cpu=cpu, default=_rows) * scale",
        "return jax.lax.platform_dependent(x, weight, cpu=cpu, default=_rows)",
        "tests/nn/test_int8_weights.py",
    ),
    Fault(
        "the digits of an activation in the wrong order",
        "lsjax/nn/matmul.py",
        "weight)[::-1]:",
        "weight):",
        "tests/nn/test_int8_weights.py -k near",
    ),
    Fault(
        "a few vectors' products in the order of the matrix",
        "lsjax/nn/matmul.py",
        "else y).T.reshape(",
        "else y).reshape(",
        "tests/nn/test_int8_weights.py -k any_number",
    ),
    Fault(
        "a CPU's embedding widened whole",
        "lsjax/nn/linear.py",
        "    table, at = jax.lax.optimization_barrier((table, at))\n",
        "",
        "tests/generation/test_compilations.py -k copy",
    ),
    Fault(
        "a CPU's experts widened whole",
        "lsjax/nn/experts.py",
        "return jax.lax.cond(expert < local, run, lambda *_: none, row, expert)",
        "return run(row, expert)",
        "tests/generation/test_compilations.py -k copy",
    ),
    Fault(
        "a new token's bits taken for numbers",
        "lsjax/cache/float_tail.py",
        "KVArray(to_storage(new, held.dtype), None)",
        "KVArray(new.astype(held.dtype), None)",
        "tests/attention/test_cached_attention.py -k int8",
    ),
    Fault(
        "an int8 block rounded twice",
        "lsjax/cache/float_tail.py",
        "            run = append_chunk(self.tail, k, v, at[0])",
        "            k, v = (self.inner.k.quantize(x).dequantize() for x in (k, v))\n"
        "            run = append_chunk(self.tail, k, v, at[0])",
        "tests/attention/test_cached_attention.py -k int8",
    ),
    Fault(
        "queries not transformed over a quantized cache",
        "lsjax/cache/float_tail.py",
        "q, k = hadamard_transform(q).astype(q.dtype), hadamard_transform(k)",
        "q, k = q, hadamard_transform(k)",
        "tests/attention/test_cached_attention.py -k int8",
    ),
    Fault(
        "a window off by one",
        "lsjax/cache/sharded.py",
        "jnp.maximum(positions + 1 - window, 0)",
        "jnp.maximum(positions - window, 0)",
        "tests/attention/test_cached_attention.py -k window",
    ),
    Fault(
        "a ring step too few",
        "lsjax/attention/ring.py",
        "jax.lax.fori_loop(0, devices - 1, ring_step, (state, block))",
        "jax.lax.fori_loop(0, devices - 2, ring_step, (state, block))",
        "tests/attention/test_cached_attention.py -k mesh",
    ),
    Fault(
        "cuDNN's gradients of a last piece that begins too early",
        "lsjax/attention/cudnn_gradients.py",
        "    shift, length = first - at,",
        "    shift, length = 0 * at,",
        "tests/attention/test_differentiable_attention.py -k cudnn",
    ),
    Fault(
        "gradients of keys added one device too late",
        "lsjax/attention/backward.py",
        "        added = ring.ring_shift(added, zigzag.devices)  # and home\n",
        "",
        "tests/attention/test_differentiable_attention.py",
    ),
    Fault(
        "packed documents see each other",
        "lsjax/training/loss.py",
        "begin = jnp.maximum(inputs.begin, at + 1 - window)",
        "begin = jnp.maximum(0 * inputs.begin, at + 1 - window)",
        "tests/training/test_step.py",
    ),
    Fault(
        "rotary tables of the wrong row",
        "lsjax/positions/rotary.py",
        "return jax.vmap(lambda row, i: row[i])(table, index)",
        "return jax.vmap(lambda row, i: row[i])(table[::-1], index)",
        "tests/generation/test_request_decides.py",
    ),
    Fault(
        "YaRN without its attention factor",
        "lsjax/positions/frequencies.py",
        "return _yarn(inv, scaling, theta), _yarn_attention_factor(scaling)",
        "return _yarn(inv, scaling, theta), 1.0",
        "tests/nn/test_golden_logits.py -k yarn",
    ),
    Fault(
        "ALiBi slopes in the wrong order of layers' heads",
        "lsjax/nn/decoder.py",
        "for slopes in layer_slopes(c, self.heads)]",
        "for slopes in [x[::-1] for x in layer_slopes(c, self.heads)]]",
        "tests/nn/test_baichuan_logits.py",
    ),
    Fault(
        "a chunk's tail read as tokens",
        "lsjax/inference/layerwise_prefill.py",
        "is_last = (positions == lengths[:, None] - 1)[..., None]",
        "is_last = (positions == positions.max())[..., None]",
        "tests/generation/test_same_tokens.py -k chunk",
    ),
    Fault(
        "a prompt's tail kept in the float block",
        "lsjax/cache/float_tail.py",
        "after = after if step.lengths is None else jnp.minimum(after, step.lengths)",
        "after = after + 0",
        "tests/generation/test_same_tokens.py -k chunk",
    ),
    Fault(
        "end-of-sequence ignored in a batch",
        "lsjax/inference/generate.py",
        "- len(ids) if stand is None else 0",
        "- len(ids) if stand is None or row else 0",
        "tests/generation/test_ending.py",
    ),
    Fault(
        "a draw that belongs to its row in a batch",
        "lsjax/inference/request.py",
        "first=i * rows,",
        "first=0,",
        "tests/generation/test_samples.py",
    ),
    Fault(
        "samples that take their neighbour's cache",
        "lsjax/inference/steps.py",
        "jnp.repeat(leaf, samples, axis=0)",
        "jnp.concatenate([leaf] * samples)",
        "tests/generation/test_samples.py",
    ),
    Fault(
        "a draft's token accepted unseen",
        "lsjax/inference/prompt_lookup.py",
        "return 1 + jnp.sum(same, axis=1)",
        "return jnp.minimum(2 + jnp.sum(same, axis=1), chosen.shape[1])",
        "tests/generation/test_lookup.py",
    ),
    Fault(
        "top_p keeps the token before the threshold only",
        "lsjax/inference/sampling.py",
        "(before < random.top_p)",
        "(before + probabilities < random.top_p)",
        "tests/generation/test_sampling.py",
    ),
    Fault(
        "the compensation token counted once",
        "lsjax/cache/compensation_token.py",
        "lse = scores + jnp.log(count.astype(jnp.float32))[:, None, None]",
        "lse = scores + jnp.log(jnp.minimum(count, 1).astype(jnp.float32))[:, None, None]",
        "tests/compression/test_window.py",
    ),
    Fault(
        "the GPU's decode kernel reads past a row's end",
        "lsjax/attention/gpu.py",
        "visible = (here >= begin[:, None]) & (here < end[:, None])",
        "visible = (here >= begin[:, None]) & (here <= end[:, None])",
        "tests/attention/test_gpu_kernels.py -k decode",
    ),
    Fault(
        "a GPU writes a token's key without its Hadamard transform",
        "lsjax/attention/gpu_token.py",
        "    k = jnp.sum(jnp.where((row == group)[:, None], transformed, 0), axis=0)",
        "    k = k.astype(jnp.float32)",
        "tests/attention/test_gpu_token.py",
    ),
    Fault(
        "a GPU takes odd channels for even ones",
        "lsjax/attention/gpu.py",
        "return [((pairs << 8) >> 8).astype(dtype), (pairs >> 8).astype(dtype)]",
        "return [(pairs >> 8).astype(dtype), ((pairs << 8) >> 8).astype(dtype)]",
        "tests/attention/test_gpu_kernels.py -k decode",
    ),
    Fault(
        "Mosaic GPU's decode kernel reads past a row's end",
        "lsjax/attention/gpu_mosaic.py",
        "(slot < over(end, scores, 1))",
        "(slot <= over(end, scores, 1))",
        "tests/attention/test_gpu_kernels.py -k without_triton",
    ),
    Fault(
        "a segment dispatched ahead is lost",
        "lsjax/inference/segments.py",
        "        state, found = self._ahead.result()\n",
        "        state, found = self._decode(self._ahead.result()[0])\n",
        "tests/generation/test_ending.py -k ahead",
    ),
    Fault(
        "a GPU's window shows one slot too few",
        "lsjax/attention/cudnn.py",
        "oldest = own + 1 - blocks.window",
        "oldest = own + 2 - blocks.window",
        "tests/attention/test_gpu_kernels.py -k in_blocks",
    ),
    Fault(
        "the TPU kernel forgets what it had at an edge",
        "lsjax/attention/tpu.py",
        "acc[h] = correction * acc[h] + added",
        "acc[h] = acc[h] + added",
        "tests/attention/test_tpu_kernel.py",
    ),
    Fault(
        "an embedding found by two devices",
        "lsjax/nn/linear.py",
        "here = (at >= 0) & (at < part.shape[0])",
        "here = (at >= 0) & (at <= part.shape[0])",
        "tests/generation/test_meshes.py",
    ),
    Fault(
        "gate and up swapped where they are fused",
        "lsjax/families/glm.py",
        'gate_up = (f"{block}/mlp/gate", f"{block}/mlp/up")',
        'gate_up = (f"{block}/mlp/up", f"{block}/mlp/gate")',
        "tests/nn/test_golden_logits.py -k chatglm",
    ),
    Fault(
        "a truncated tensor accepted",
        "lsjax/checkpoint/safetensors_header.py",
        "        if end > data_bytes:",
        "        if end > 2 * data_bytes:",
        "tests/checkpoint/test_faults.py",
    ),
    Fault(
        "queries and keys left as llama.cpp orders them",
        "lsjax/checkpoint/gguf/tensors.py",
        "return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)",
        "return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)",
        "tests/gguf/test_gguf_models.py -k come_back",
    ),
    Fault(
        "an unknown key of a GGUF file passed over",
        "lsjax/checkpoint/gguf/model.py",
        "    file.metadata.refuse_unread(",
        "    file.metadata.mark_known(",
        "tests/gguf/test_gguf_refusals.py -k named",
    ),
    Fault(
        "a resumed step counted twice",
        "lsjax/training/loop.py",
        "checkpoints.save(step, state, begins)",
        "checkpoints.save(step - 1, state, begins)",
        "tests/training/test_resume.py",
    ),
    Fault(
        "half a character shown",
        "lsjax/tokenizer/detokenizer.py",
        'return self._utf8.decode(b"".join(self._bytes(ids)))',
        'return self._utf8.decode(b"".join(self._bytes(ids)), final=True)',
        "tests/tokenizer/test_tokenizer_streaming.py",
    ),
    Fault(
        "scales left out of a plan's cache",
        "lsjax/cache/spec.py",
        "        total += math.prod(here) * x.dtype.itemsize",
        "        total += math.prod(here) * x.dtype.itemsize * (x.ndim > 3)",
        "tests/attention/test_cache_store.py",
    ),
    Fault(
        "a rolling window that forgets the lap before",
        "lsjax/cache/rolling.py",
        "attend(lap - capacity, jnp.minimum(step.end, lap), before)",
        "attend(lap - capacity, jnp.minimum(step.end, 0), before)",
        "tests/attention/test_cached_attention.py -k rolling",
    ),
    Fault(
        "padding that overwrites a shorter row's window",
        "lsjax/cache/rolling.py",
        "valid = None if step.lengths is None else step.positions < step.lengths[:, None]",
        "valid = None",
        "tests/attention/test_cached_attention.py -k keeps_its_window",
    ),
    Fault(
        "a segment that goes on though all rows have ended",
        "lsjax/inference/steps.py",
        "return (i < steps) & ~jnp.all(state.done)",
        "return i < steps",
        "tests/generation/test_ending.py",
    ),
    Fault(
        "a document's last token left out",
        "lsjax/cache/shared_prefix.py",
        "begin, end, blocks = None, jnp.full((1, rows), self.length), None",
        "begin, end, blocks = None, jnp.full((1, rows), self.length - 1), None",
        "tests/attention/test_cached_attention.py -k after_a_document",
    ),
    Fault(
        "a compressed document without what stands for its dropped tokens",
        "lsjax/cache/window.py",
        "        return merge(partial, self._attend_to_dropped(q, step))",
        "        return partial",
        "tests/compression/test_document.py",
    ),
    Fault(
        "a device's queries that see only its own part of a document's window",
        "lsjax/cache/window.py",
        "        if around:  # the window's shards stay where they are",
        "        if around and False:",
        "tests/compression/test_document.py",
    ),
    Fault(
        "a question's last token that does not see the document",
        "lsjax/cache/shared_prefix.py",
        "step.query_positions < step.lengths[:, None]",
        "step.query_positions + 1 < step.lengths[:, None]",
        "tests/attention/test_cached_attention.py -k after_a_document",
    ),
    Fault(
        "keys that many rows meet without their scales",
        "lsjax/attention/blockwise.py",
        "keys, factor = _times(keys, factor), None",
        "factor = None",
        "tests/attention/test_cached_attention.py -k after_a_document",
    ),
    Fault(
        "a saved token put into the slot of one on another device",
        "lsjax/cache/token_slices.py",
        "np.argsort(layer.zigzag.permutation(layer.k.capacity))",
        "layer.zigzag.permutation(layer.k.capacity)",
        "tests/documents/test_saved.py -k slots_of_their_positions",
    ),
    Fault(
        "a turn of a chat that takes over what was written otherwise",
        "lsjax/documents/chat.py",
        "same = _common(held.ids, ids[:-1])",
        "same = len(held.ids)",
        "tests/documents/test_chat.py -k cuts_earlier_turns",
    ),
    Fault(
        "a plan with a copy of the document for each question",
        "lsjax/planning/shared_document.py",
        "return DocumentSpecs(document_spec(deployment, cached),",
        "return DocumentSpecs(deployment.cache_spec(deployment.batch, cached, 0),",
        "tests/planning/test_plan.py -k share_a_document",
    ),
    Fault(
        "a damaged document that stops others",
        "lsjax/documents/library.py",
        "            saved.folder.note_damage(error)\n            continue",
        "            raise",
        "tests/documents/test_saved.py -k does_not_stop_others",
    ),
    Fault(
        "rows begin without the end of their document",
        "lsjax/inference/generate.py",
        "engine.cache_after(document.rest, spec",
        "engine.cache_after(jax.tree.map(lambda x: 0 * x, document.rest), spec",
        "tests/documents/test_answers.py -k plain_prompt",
    ),
    Fault(
        "rows that begin with empty states after a document",
        "lsjax/cache/shared_prefix.py",
        "lambda x: _repeated(x, own.batch), held",
        "lambda x: 0 * _repeated(x, own.batch), held",
        "tests/documents/test_recurrent_states.py -k first_token",
    ),
    Fault(
        "the first snapshot of a quarter kept, not the last one",
        "lsjax/documents/manifest.py",
        "for at in sorted(states)}",
        "for at in sorted(states, reverse=True)}",
        "tests/documents/test_recurrent_states.py -k quarter",
    ),
    Fault(
        "snapshots that do not count left behind",
        "lsjax/documents/folder.py",
        "            self._delete_snapshots()",
        "            pass",
        "tests/documents/test_recurrent_states.py -k quarter",
    ),
    Fault(
        "a saved slice read for the one before it",
        "lsjax/documents/folder.py",
        "reads.append((at, [",
        "reads.append((max(at - self.manifest.slice, 0), [",
        "tests/documents/test_saved.py",
    ),
    Fault(
        "a question encoded where its tokens are others",
        "lsjax/documents/question.py",
        "borders = len(before), len(before.rstrip())",
        "borders = (len(before),)",
        "tests/documents/test_question.py",
    ),
    Fault(
        "a wheel of any hash taken",
        "lsjax/runtime/wheels.py",
        "if found != wheel.sha256:",
        "if not found:",
        "tests/scripts/test_demo.py",
    ),
    Fault(
        "a damaged wheel kept",
        "lsjax/runtime/wheels.py",
        "if path.exists() and _sha256(path) == wheel.sha256:",
        "if path.exists():",
        "tests/scripts/test_demo.py",
    ),
    Fault(
        "measured cells measured again",
        "lsjax/evals/cells.py",
        "if name not in self.values]",
        "if name]",
        "tests/evals/test_cells.py",
    ),
    Fault(
        "results of another model gone on with",
        "lsjax/evals/cells.py",
        "if found.get(name) != self._measured.get(name):",
        "if name not in found:",
        "tests/evals/test_cells.py -k refused",
    ),
    Fault(
        "a part of a number taken for the answer",
        "lsjax/evals/ruler/tasks.py",
        "sum(a in said for a in self.answers)",
        "sum(a in answer for a in self.answers)",
        "tests/evals/test_ruler.py",
    ),
    Fault(
        "two tokens that begin a text",
        "lsjax/evals/ruler/measure.py",
        "if document[: len(tokenizer.prefix)] != tokenizer.prefix:",
        "if tokenizer.prefix:",
        "tests/evals/test_ruler.py -k one_token",
    ),
    Fault(
        "agreement with itself",
        "lsjax/evals/cache_dtypes.py",
        "np.mean(np.array(found.top) == np.array(reference.top))",
        "np.mean(np.array(found.top) == np.array(found.top))",
        "tests/evals/test_cache_dtypes.py",
    ),
    Fault(
        "results of a loop in constants, which all layers have at program start",
        "lsjax/runtime/loops.py",
        "jnp.full(x.shape, value.astype(x.dtype))",
        "jnp.zeros(x.shape, x.dtype)",
        "tests/nn/test_loops.py",
    ),
    Fault(
        "pruned blocks stand with the score of one token",
        "lsjax/attention/sparse/rule.py",
        "scores + math.log(TILE)",
        "scores",
        "tests/attention/test_sparse_prefill.py -k softmax",
    ),
    Fault(
        "sparse: blocks chosen by the largest score of a tile alone",
        "lsjax/attention/sparse/rule.py",
        "jnp.exp(seen - jnp.max(seen, axis=(2, 3), keepdims=True))",
        "jnp.exp(seen - jnp.max(seen, axis=3, keepdims=True))",
        "tests/attention/test_sparse_prefill.py -k softmax",
    ),
    Fault(
        "sparse: with dual chunk attention blocks chosen by limited distances",
        "lsjax/attention/sparse/rule.py",
        "scores if estimating is None else scores_of(estimating, own)",
        "scores",
        "tests/attention/test_sparse_prefill.py -k without_a_limit",
    ),
    Fault(
        "sparse: earlier chunks scored as the chunk before",
        "lsjax/attention/sparse/rule.py",
        "jnp.clip(len(views) - 1 - ago, 0,",
        "jnp.clip(len(views) - 1 - ago, len(views) // 2,",
        "tests/attention/test_sparse_prefill.py -k without_a_limit",
    ),
    Fault(
        "sparse: a tile's own block unmasked",
        "lsjax/attention/sparse/rule.py",
        "begin + TILE <= stop[:, :, None, :1]",
        "begin + TILE <= stop[:, :, None, -1:]",
        "tests/attention/test_sparse_prefill.py -k last_bit",
    ),
    Fault(
        "sparse: the last tokens of a padded row's prompt",
        "lsjax/attention/sparse/rule.py",
        "end > lengths - rule.last_tokens",
        "end > jnp.max(lengths) - rule.last_tokens",
        "tests/attention/test_sparse_prefill.py -k devices",
    ),
    Fault(
        "means of blocks counted as known before they are full",
        "lsjax/cache/sparse.py",
        "end // TILE * TILE))",
        "-(-end // TILE) * TILE))",
        "tests/attention/test_sparse_prefill.py -k means",
    ),
    Fault(
        "means of devices in the order of devices",
        "lsjax/cache/sparse.py",
        "order = jnp.argsort(at.ravel())",
        "order = jnp.arange(at.size)",
        "tests/attention/test_sparse_prefill.py -k devices",
    ),
    Fault(
        "density without the dense layers",
        "lsjax/inference/sparsity.py",
        "density = ((whole - len(layers)) * full + sparse) / (whole * full)",
        "density = sparse / (len(layers) * full)",
        "tests/generation/test_sparse_prefill.py -k told",
    ),
    Fault(
        "a document read with sparse prefill used without",
        "lsjax/documents/fingerprint.py",
        '"sparse_prefill": str(sparse and _told(sparse)),',
        '"sparse_prefill": "None",',
        "tests/generation/test_sparse_prefill.py -k another_alpha",
    ),
    Fault(
        "TPU: blocks after a tile's last one",
        "lsjax/attention/sparse/tpu.py",
        "& (first + j < count[b, h])",
        "",
        "tests/attention/test_sparse_kernels.py -k tpu",
    ),
    Fault(
        "GPU: a block's last keys read as its first ones",
        "lsjax/attention/sparse/gpu.py",
        "* TILE + place * keys",
        "* TILE",
        "tests/attention/test_sparse_kernels.py -k gpu",
    ),
)


def main(_: list[str]) -> int:
    chosen = [fault for fault in FAULTS if FLAGS.only in fault.name]
    with tempfile.TemporaryDirectory() as folder:
        right = _copy(pathlib.Path(folder) / "right")
        tests = sorted({fault.test.split()[0] for fault in chosen})
        done, _ = _quick_tests(right, " ".join(tests), workers=FLAGS.jobs)
        print(f"as it is: {_last_line(done)}", flush=True)
        if done.returncode:
            print(done.stdout[-4000:])
            return 1
        with concurrent.futures.ThreadPoolExecutor(FLAGS.jobs) as pool:
            missed = 0
            tried = pool.map(_tried_in(folder), chosen)
            for fault, (done, seconds) in zip(chosen, tried, strict=True):
                caught = done.returncode == 1 and " failed" in _last_line(done)
                missed += not caught
                verdict = "caught" if caught else "MISSED"
                print(f"{verdict}  {seconds:4.0f} s  {fault.name}: {fault.test}", flush=True)
                if not caught:
                    print(done.stdout[-2000:], done.stderr[-2000:])
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return int(missed > 0)


def _tried_in(folder: str):
    def tried(fault: Fault):
        root = _copy(pathlib.Path(folder) / str(FAULTS.index(fault)))
        file = root / fault.file
        text = file.read_text()
        assert text.count(fault.right) == 1, f"{fault.name}: not once in {fault.file}"
        file.write_text(text.replace(fault.right, fault.wrong))
        try:
            return _quick_tests(root, fault.test + " -x")
        finally:
            shutil.rmtree(root)

    return tried


def _copy(to: pathlib.Path) -> pathlib.Path:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, to, ignore=ignored)
    return to


def _quick_tests(root: pathlib.Path, words: str, workers: int = 0):
    """Runs tests that are not slow on the library in `root`: the process, and its seconds."""
    pytest = [sys.executable, "-m", "pytest", "-q", f"-n{workers}", "-p", "no:cacheprovider"]
    start = time.monotonic()
    done = subprocess.run(
        [*pytest, "-m", "not slow", *words.split()],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    return done, time.monotonic() - start


def _last_line(done: subprocess.CompletedProcess) -> str:
    return (done.stdout.strip().splitlines() or ["nothing said"])[-1]


if __name__ == "__main__":
    app.run(main)
