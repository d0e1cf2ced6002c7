"""Estimate the peak memory of a GRPO run, part by part, from the model's shape and the settings.

What is counted, and the sources of the numbers:

- Weights: NF4 with double quantisation takes 4.127 bits per weight (QLoRA, arXiv:2305.14314, section 3). These are 4
  bits per weight, an 8-bit constant per 64 weights, and a 32-bit constant per 256 of those. Weights that are not
  quantised have the run's own dtype.
- Adapter: fp32 weights and gradients, and Adam's two moments: 16 bytes per parameter. This follows ZeRO
  (arXiv:1910.02054, section 3.1), without its half-precision copy.
- Keys and values: 2 × layers × key-value heads × head size per token (arXiv:2211.05102, section 2.1).
- Activations: what autograd keeps of a Llama-like decoder layer with LoRA. It was counted with hooks on saved tensors
  (`docs/training.md`). With checkpointing: the input of each layer, and the recomputation of one layer
  (arXiv:1604.06174).
- Head: TRL computes log-probabilities in tiles of at most 4096 tokens × 32768 vocabulary entries. Without Triton,
  about nine such tiles in fp32 exist at once in the backward pass (trl/kernels/chunked_logprob.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.fit.shape import ModelShape
from common.fit.step import Step, Wave
from common.settings.grpo import TrainingArgs

MIB, GIB = 2**20, 2**30
# Measured: this program after its imports; and sentence encoder, tokenizer and data together.
CPU_LIBRARIES, ENCODER = 540 * MIB, 140 * MIB
QUANTISING = 110 * MIB  # measured on a CPU: bitsandbytes, and its copies of the tensor that it is quantising
CUDA_CONTEXT = 800 * MIB  # assumed: 0.5 to 0.8 GiB, depending on card and driver
NF4_BYTES = 4.127 / 8
HEAD_TOKENS, HEAD_COLUMNS = 4096, 32768  # TOKEN_CHUNK_SIZE and _CHUNKED_LOGPROB_CHUNK_SIZE of TRL 1.16
HEAD_TILES_WITHOUT_TRITON = 9.25
VLLM_ON_CPU = 3.5 * GIB  # libraries and 1 GiB of keys and values, without the weights (measured: 4 GB with 135M)
SERVER, PACKED = "the vLLM server", "weights packed for the CPU"

When = Literal["always", "loading", "rollouts", "worker", "training"]


@dataclass(frozen=True, slots=True)
class Part:
    """Memory for one purpose.

    Attributes:
        name: the purpose, for the table.
        bytes: how much.
        when: in which phase of the run it is used.
    """

    name: str
    bytes: float
    when: When = "always"


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPU or the computer on which a run would train.

    Attributes:
        gpu: whether it is a GPU.
        name: of the GPU, for messages.
        total, free: bytes of its memory.
        four_bit: whether the base model is quantised to 4 bits.
        cpu_dtype: of matrix products on a CPU.
        processes: number of processes that share this memory: one per GPU, but all of them on a CPU.
    """

    gpu: bool
    name: str
    total: float
    free: float
    four_bit: bool
    cpu_dtype: str = "float32"
    processes: int = 1

    @property
    def width(self) -> int:
        """Bytes per number in weights, keys and values."""
        return 2 if self.gpu else 4

    @property
    def half(self) -> bool:
        """Whether the training step runs under autocast, in bf16 or fp16."""
        return self.gpu or self.cpu_dtype == "bfloat16"


def estimate(args: TrainingArgs, shape: ModelShape, step: Step, machine: Machine) -> list[Part]:
    """The parts of one process's memory at its peak, and the memory of a server that the run starts.

    Args:
        args: settings of the run.
        shape: of the base model and adapter.
        step: what a step generates.
        machine: on which the run would train.
    """
    local_worker = not (args.worker_url or args.vllm_url or args.vllm_python)
    local_rollouts = not (args.vllm_url or args.vllm_python)
    parts = [
        Part("CUDA context", CUDA_CONTEXT) if machine.gpu else Part("libraries", CPU_LIBRARIES),
        Part(f"base model, {_weights_in(machine)}", _weights(shape, machine)),
        Part("adapter, its gradients and Adam's moments, fp32", 16 * shape.trained),
    ]
    if not machine.gpu:
        parts.append(Part("sentence encoder, tokenizer, data", ENCODER))
        if machine.four_bit or shape.stored_bytes < machine.width:
            loading = shape.stored_bytes * shape.parameters + (QUANTISING if machine.four_bit else 0)
            parts.append(Part("loading: the model's files", loading, "loading"))
        if machine.half:
            parts.append(Part("loading: weights that become bf16, in fp32", 2 * shape.linear, "loading"))
    if args.vllm_python is not None:
        share = args.vllm_gpu_memory * machine.total if machine.gpu else 4 * shape.parameters + VLLM_ON_CPU
        parts.append(Part(SERVER, share))
    copies = 0 if machine.gpu else _packed(shape, machine)
    if local_rollouts:
        parts.append(Part("states of the rollouts, kept for training", _states(args, shape, step, machine)))
        parts.append(Part(f"rollouts: {PACKED}", copies, "rollouts"))
        parts.append(Part("rollouts: keys and values, logits", _rollouts(args, shape, step, machine), "rollouts"))
    if local_worker:
        parts.append(Part(f"worker: {PACKED}", copies, "worker"))
        parts.append(Part("worker: keys and values of a micro-batch", _worker(args, shape, step, machine), "worker"))
    parts += _training(args, shape, step, machine)
    return [part for part in parts if part.bytes]


def peak(parts: Sequence[Part], machine: Machine) -> float:
    """Bytes of all processes together at the moment that needs most.

    Generating and training take turns. On a GPU, both use the same memory in turn. On a CPU the program keeps memory
    that it has freed (`training.device.tune_for_cpu`). Training cannot reuse the gaps that the packed weights leave,
    and can reuse about half of the memory for keys and values (measured, docs/training.md).
    """

    def together(*whens: When) -> float:
        return sum(part.bytes for part in parts if part.when in whens)

    packed = max((part.bytes for part in parts if part.name.endswith(PACKED)), default=0.0)
    server = sum(part.bytes for part in parts if part.name == SERVER)
    generating, training = max(together("rollouts"), together("worker")), together("training")
    kept = 0.0 if machine.gpu else packed + (generating - packed) / 2
    worst = max(generating, kept + training, together("loading"))
    return machine.processes * (together("always") - server + worst) + server


def _weights_in(machine: Machine) -> str:
    if machine.four_bit:
        return "NF4"
    if machine.gpu:
        return "16 bits"
    return "bf16, the head fp32" if machine.half else "fp32"


def _weights(shape: ModelShape, machine: Machine) -> float:
    if machine.four_bit:
        return NF4_BYTES * shape.linear + machine.width * (shape.parameters - shape.linear)
    return (2 if machine.half else 4) * shape.linear + machine.width * (shape.parameters - shape.linear)


def _packed(shape: ModelShape, machine: Machine) -> float:
    """Bytes of the copies of linear layers in oneDNN's layout (`common.decoding.packing`)."""
    return (2 if machine.cpu_dtype == "bfloat16" else 4) * ((0 if machine.four_bit else shape.linear) + shape.head)


def _rollouts(args: TrainingArgs, shape: ModelShape, step: Step, machine: Machine) -> float:
    cached = step.completions * (step.planner_prompt + args.max_completion_length) * shape.cached_elements
    # Logits, their softmax, its cumulative sum and two temporary tensors, all in fp32.
    logits = 5 * 4 * step.completions * shape.vocabulary
    return machine.width * cached + logits + _states(args, shape, step, machine)


def _states(args: TrainingArgs, shape: ModelShape, step: Step, machine: Machine) -> float:
    """Bytes of what went into the first adapted layer, of all completions; 0 if training runs all layers anyway."""
    if not _has_own_pass(args, shape, machine) or shape.open_layers == shape.layers:
        return 0.0
    return 4 * step.completions * (step.planner_prompt + args.max_completion_length) * shape.hidden


def _worker(args: TrainingArgs, shape: ModelShape, step: Step, machine: Machine) -> float:
    return max(_micro_batch(args, shape, wave, machine) for wave in (step.solve, step.combine, step.scoreboard) if wave)


def _micro_batch(args: TrainingArgs, shape: ModelShape, wave: Wave, machine: Machine) -> float:
    """Bytes for keys and values of the largest micro-batch of a wave.

    On a CPU the shared beginning of the prompts is stored once. On a GPU it is stored once per row, and all prompts
    are run in one pass.
    """
    own = wave.own + args.worker_max_tokens
    width = wave.shared + own if machine.gpu else own
    rows = max(1, min(wave.calls, args.worker_batch_tokens // width))
    if not machine.gpu:
        tokens = wave.shared + rows * own
        return machine.width * tokens * shape.cached_elements + 5 * 4 * rows * shape.vocabulary
    reading = rows * wave.own * 3 * (shape.intermediate + shape.hidden)
    return machine.width * (rows * width * shape.cached_elements + reading) + 6 * rows * shape.vocabulary


def _training(args: TrainingArgs, shape: ModelShape, step: Step, machine: Machine) -> list[Part]:
    """Memory of the forward and backward pass of one micro-batch."""
    rows, answer = args.batch_size, args.max_completion_length
    checkpointing = _checkpoints(args, machine)
    if checkpointing or machine.processes > 1:
        prompt_rows, per_row = 0, step.planner_prompt + answer
    else:  # a group's prompt is run once, except its last token, which is run with each answer
        prompt_rows, per_row = -(-rows // args.num_generations), answer + 1
    tokens = prompt_rows * step.planner_prompt + rows * per_row
    layer = _layer(shape, machine, tokens, prompt_rows, rows, step.planner_prompt, per_row)
    if checkpointing:
        kept = shape.layers * tokens * shape.hidden * machine.width + layer
    else:
        kept = shape.open_layers * layer
        # Keys and values of prompt and answer, in all layers.
        kept += machine.width * rows * (step.planner_prompt + per_row) * shape.cached_elements if prompt_rows else 0
        own = _has_own_pass(args, shape, machine)
        if machine.half and not machine.gpu and not machine.four_bit and not own:
            kept += 2 * shape.head  # autocast's copy of it: TRL's pass over the prompts uses it
    label = "activations, checkpointed" if checkpointing else "activations of forward and backward"
    return [
        Part(label, kept, "training"),
        Part("logits of forward and backward", _head(args, shape, machine, rows * answer), "training"),
    ]


def _checkpoints(args: TrainingArgs, machine: Machine) -> bool:
    """Whether the training step computes activations again instead of keeping them."""
    return machine.gpu if args.gradient_checkpointing is None else args.gradient_checkpointing


def _has_own_pass(args: TrainingArgs, shape: ModelShape, machine: Machine) -> bool:
    """Whether the training step runs the model as `common.decoding.log_probs` does."""
    alone = machine.processes == 1 and not _checkpoints(args, machine)
    return shape.known_head and not machine.gpu and alone


def _layer(
    shape: ModelShape, machine: Machine, tokens: int, prompt_rows: int, rows: int, prompt: int, per_row: int
) -> float:
    """Bytes that autograd keeps of one layer.

    - Per token: the inputs of both norms (fp32) and their outputs, which LoRA reads. Under autocast, the outputs are
      converted again for each of five projections. Also the query, the attention's output, gate, up, its activation,
      their product, and LoRA's inner values.
    - Per key: keys and values, repeated for all heads.
    - On a CPU: the attention weight of every pair of query and key.
    """
    wide = shape.heads * shape.head_dim
    keys = prompt_rows * prompt + rows * (per_row + (prompt if prompt_rows else 0))
    mlp, inner = 4 * shape.intermediate, 7 * shape.rank
    if machine.half:
        token = 4 * 2 * shape.hidden + 2 * (5 * shape.hidden + 3 * wide + mlp + inner)
        kept = tokens * token + 2 * 2 * wide * keys
    else:
        kept = 4 * (tokens * (4 * shape.hidden + 2 * wide + mlp + inner) + 2 * wide * keys)
    if not machine.gpu:
        pairs = prompt_rows * prompt**2 + rows * per_row * (per_row + (prompt if prompt_rows else 0))
        kept += 4 * shape.heads * pairs
    return kept


def _head(args: TrainingArgs, shape: ModelShape, machine: Machine, tokens: int) -> float:
    """Bytes of the tiles in which log-probabilities are computed, and of the gradient of the hidden states."""
    hidden = 4 * tokens * shape.hidden
    if _has_own_pass(args, shape, machine):
        return (2 * shape.head if machine.half else 0) + 4 * 4 * 128 * shape.vocabulary + hidden
    tile = min(tokens, HEAD_TOKENS) * min(shape.vocabulary, HEAD_COLUMNS)
    return (2 * tile if machine.gpu else 4 * HEAD_TILES_WITHOUT_TRITON * tile) + hidden
