"""GPU memory of a training run, by part. Checked against LongLoRA's Table 12.

What takes memory, in bytes; T trained parameters, P all of them, N tokens of a batch, d width,
f FFN width, V vocabulary, L layers, `shard` GPUs that share a part:

weights      2 P in bf16/fp16; NF4 with double quantization 0.5 + 1/64 + 4/(64·256) = 0.516 for a
             linear layer's element (4.127 bits), int8 1 and 4 a row; embeddings, head and norms
             stay in 16 bit. An adapter's weights, and embeddings and norms trained in addition,
             are fp32. Shared by ZeRO-3 and FSDP. `layer_offloading` leaves three decoder layers on
             the GPU: the one at work, the one before and the one fetched ahead.
gradients    as the trained weights; shared from ZeRO-2 on.
optimizer    DeepSpeed: fp32 master (4 T) and states (AdamW 8 T); else states in the type of the
             weights. Shared from ZeRO-1 on; on the CPU with offload.
buffers      DeepSpeed's gradient buckets (two while communication overlaps), DDP's copy of the
             gradients, what ZeRO-3 and FSDP gather at a time.
step         what an optimizer step holds for a moment: DeepSpeed's flattened (2 T) and fp32 (4 T)
             gradients, AdamW's temporaries.
activations  with checkpointing the input of each layer, 2 N d L; without, everything a layer saves,
             20 N d + 4 N d_kv + 8 N f or so (see `saved_by_layer`), times L. Offloaded, none of
             it: only the layer at work is on the GPU. `tiled_mlp` keeps of an FFN its input alone,
             and computes a tile of it at a time.
loss         12 N V while the loss runs backward (log-probabilities, their gradient and the
             logits' gradient in fp32) and the last norm, 8 N d; at least that norm's backward
             pass, 24 N d. Chunked: a chunk (an eighth) of the logits in fp32 and two 16-bit
             copies of all. Fused with the head (Liger, Cut Cross Entropy): no logits.
layer        where a layer's backward pass needs more than the loss: the excess.
context      1 GiB for CUDA and its libraries, 1 GiB for NCCL with several GPUs.
fragments    what the allocator reserves beyond the tensors: FRAGMENTS of activations, loss, layer.

With `context_parallel_size` P the tokens of a GPU are N/P, and a layer holds its queries, keys,
values and output once more while they are exchanged (Ulysses does; a ring or a halo holds less).

`activations`, `loss` and `layer` were compared with the live tensors of real training steps
(`tests/plan/test_memory.py`). `context` is two round figures; the one constant fitted to Table 12
is FRAGMENTS.

Assumptions: the parts add, also `step`, though it runs after the loss is gone: Table 12's full
fine-tune is 20.6–22.7 GB above LoRA at *every* length, of which gradients and optimizer explain
half; so the allocator does not hand the loss's memory to the step. Attention never stores its
scores, unless it is `eager`. S² saves time, not memory (Table 12); in torch's own kernels it keeps
copies of the shifted heads.
`needed` is the total without `fragments`: allocators return cached memory when a GPU is full, and
Axolotl's default (expandable segments) fragments little, so a run fits if `needed` fits, and is
`tight` where the total does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from longlora_plugin.plan.parameters import Parameters
from longlora_plugin.plan.shape import ModelShape

GIB = 2**30
CONTEXT = 1.0 * GIB
COMMUNICATION = 1.0 * GIB
FRAGMENTS = 0.25
LOGIT_BYTES = 12.0
"""Bytes for a logit while the loss runs backward."""
LAYERS_ON_GPU = 3
"""Decoder layers that `layer_offloading` has on the GPU at once."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

AS_WEIGHTS = None
OPTIMIZERS: dict[str, tuple[int, float | None]] = {
    "adamw": (2, AS_WEIGHTS),
    "adam": (2, AS_WEIGHTS),
    "adamw_8bit": (2, 1 + 4 / 256),
    "adamw_4bit": (2, 0.5 + 4 / 128),
    "ademamix": (3, AS_WEIGHTS),
    "ademamix_8bit": (3, 1 + 4 / 256),
    "lion": (1, AS_WEIGHTS),
    "lion_8bit": (1, 1 + 4 / 256),
    "muon": (1, AS_WEIGHTS),
    "adagrad": (1, AS_WEIGHTS),
    "rmsprop": (1, AS_WEIGHTS),
    "adafactor": (0, AS_WEIGHTS),
    "sgd": (0, AS_WEIGHTS),
}
"""Kind of optimizer → states a parameter has, bytes of each."""


@dataclass(frozen=True)
class Training:
    """The part of a run that decides its memory, as plain values.

    Attributes:
        sequence_len: tokens of a row.
        micro_batch_size: rows a GPU holds at once.
        gpus: GPUs of the run, all of them data-parallel.
        compute_bytes: of an activation: 2 in bf16 and fp16, else 4.
        quantization: `nf4`, `int8` or None.
        checkpointing: layers are computed again in the backward pass.
        offload_activations: what is kept for the backward pass lies on the CPU: the inputs of
            layers with checkpointing, else everything a layer saves.
        mlp_tiles: tiles that an FFN is computed in; 1: all at once.
        offload_layers: frozen weights of decoder layers lie on the CPU but for LAYERS_ON_GPU.
        optimizer: a key of OPTIMIZERS.
        optimizer_temporaries: parameter-sized temporaries of a step.
        engine: `ddp`, `deepspeed` or `fsdp`.
        zero_stage: what is shared: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too.
        offload_optimizer, offload_weights: kept on the CPU.
        bucket_elements: of one of DeepSpeed's gradient buckets; None means d².
        buckets: how many there are: two while communication overlaps.
        live_elements: parameters ZeRO-3 may keep gathered.
        loss: `full`, `chunked` or `fused`.
        loss_chunks: of a chunked loss.
        scores_width: keys a query's stored scores cover: `eager` attention only, else 0.
        shifted_copies: S² in torch's own kernels (sdpa) keeps the shifted heads' share twice.
        dense_mask: attention gets an N × N mask.
    """

    sequence_len: int
    micro_batch_size: int = 1
    gpus: int = 1
    context_parallel: int = 1
    compute_bytes: int = 2
    quantization: str | None = None
    checkpointing: bool = True
    offload_activations: bool = False
    mlp_tiles: int = 1
    offload_layers: bool = False
    optimizer: str = "adamw"
    optimizer_temporaries: int = 0
    engine: str = "ddp"
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket_elements: int | None = None
    buckets: int = 2
    live_elements: int = 0
    loss: str = "full"
    loss_chunks: int = 8
    scores_width: int = 0
    shifted_copies: bool = False
    dense_mask: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that a GPU holds at once."""
        return -(-self.sequence_len // self.context_parallel) * self.micro_batch_size

    @property
    def data_parallel(self) -> int:
        """How many rows the GPUs work on at once, each as `micro_batch_size` of them."""
        return max(1, self.gpus // self.context_parallel)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part; the parts add up to `total`."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    step: float
    activations: float
    loss: float
    layer: float
    context: float
    fragments: float

    @property
    def total(self) -> float:
        """What nvidia-smi shows while the GPU is not full."""
        return sum(asdict(self).values())

    @property
    def needed(self) -> float:
        """What must fit: the total without fragments."""
        return self.total - self.fragments

    def gib(self) -> dict[str, float]:
        """The parts, `total` and `needed`, in GiB."""
        parts = {name: value / GIB for name, value in asdict(self).items()}
        return {**parts, "total": self.total / GIB, "needed": self.needed / GIB}


def saved_by_layer(
    shape: ModelShape, *, adapter: bool, compute_bytes: int = 2, mlp_tiles: int = 1
) -> float:
    """Bytes a layer saves for its backward pass, for one token, without stored scores.

    A norm: its input in fp32 (4 d), normalised and scaled (2 · 2 d); two of them. Queries, keys,
    values, the attention's output and its fp32 log-sum a head. FFN: gate, its activation, up, their
    product. With an adapter on the attention projections only, the frozen FFN keeps neither its
    input (2 d) nor the product (2 f). A tiled FFN keeps its input and one tile of the rest.
    """
    width = compute_bytes
    queries, values = shape.heads * shape.head_dim, shape.heads * shape.value_dim
    keys_values = shape.kv_heads * (shape.head_dim + shape.value_dim)
    saved = (
        2 * (4 + 2 * width) * shape.hidden
        + width * (queries + keys_values + values)
        + 4 * shape.heads
    )
    inner = (3 if adapter else 4) * width * shape.ffn_width
    if mlp_tiles > 1:
        return saved + inner / mlp_tiles
    return saved + inner - (width * shape.hidden if adapter else 0)


def _layer_backward(
    shape: ModelShape, *, adapter: bool, compute_bytes: int, mlp_tiles: int = 1
) -> float:
    # The FFN's inner gradients while everything saved still lives; without an adapter the
    # product's memory is free by then. A tiled FFN collects its input's gradient as well.
    inner = (3 if adapter else 2) * shape.ffn_width / mlp_tiles
    return compute_bytes * (inner + shape.hidden * (2 if mlp_tiles > 1 else 1))


def _attended(shape: ModelShape, compute_bytes: int) -> float:
    """Queries, keys, values and output of one token."""
    both = shape.head_dim + shape.value_dim
    return compute_bytes * (shape.heads + shape.kv_heads) * both


def memory(shape: ModelShape, parameters: Parameters, training: Training) -> Memory:
    """Memory of a training run on each of its GPUs."""
    share = training.gpus if training.engine != "ddp" else 1
    shards = [share if training.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    optimizer_shard, gradient_shard, weight_shard = shards
    deepspeed = training.engine == "deepspeed"
    width = training.compute_bytes
    adapter = parameters.trained_base == 0
    trained_width = width if deepspeed or not (adapter or training.engine == "fsdp") else 4
    trained = parameters.trained

    weights = _base_weights(parameters, training, trained_width)
    weights += (parameters.lora + parameters.copies) * trained_width
    unit_share = parameters.largest_unit / parameters.base
    buffers = 0.0
    if training.zero_stage == 3:
        prefetched = min(5e8, parameters.largest_unit)
        gathered = max(parameters.largest_unit + prefetched, training.live_elements)
        if training.engine == "fsdp":
            gathered = 2 * parameters.largest_unit + parameters.outside_layers
        buffers += weights * min(1.0, unit_share * gathered / parameters.largest_unit)
    weights = 0.0 if training.offload_weights else weights / weight_shard
    weights -= _offloaded_layers(shape, parameters, training) / weight_shard

    gradients = trained * trained_width / gradient_shard
    states, state_bytes = OPTIMIZERS[training.optimizer]
    master = 4 if deepspeed else 0
    optimizer_width = 4 if deepspeed else trained_width
    optimizer_bytes = master + states * (optimizer_width if state_bytes is None else state_bytes)
    step = training.optimizer_temporaries * optimizer_width + (width + 4 if deepspeed else 0)
    if training.offload_optimizer:
        optimizer_bytes = step = 0
        gradients = 0.0 if gradient_shard > 1 else gradients
    if deepspeed and training.gpus > 1:
        bucket = training.bucket_elements
        buffers += (bucket if bucket is not None else shape.hidden**2) * width * training.buckets
    elif training.engine == "ddp" and training.gpus > 1:
        buffers += trained * trained_width

    activations, loss, layer = _activations(shape, parameters, training)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=trained * optimizer_bytes / optimizer_shard,
        buffers=buffers,
        step=trained * step / optimizer_shard,
        activations=activations,
        loss=loss,
        layer=layer,
        context=CONTEXT + (COMMUNICATION if training.gpus > 1 else 0),
        fragments=FRAGMENTS * (activations + loss + layer),
    )


def _activations(
    shape: ModelShape, parameters: Parameters, training: Training
) -> tuple[float, float, float]:
    """What is kept of all layers, what the loss takes, what a layer's backward pass adds to it."""
    width, tokens = training.compute_bytes, training.tokens
    adapter = parameters.trained_base == 0
    scores = shape.heads * tokens * min(training.scores_width, training.sequence_len) * (width + 4)
    saved = _saved(shape, parameters, training) + scores
    kept = width * shape.hidden * tokens if training.checkpointing else saved
    activations = 0.0 if training.offload_activations else kept * shape.layers
    logits = (
        shape.vocab
        * {
            "full": LOGIT_BYTES,
            "chunked": LOGIT_BYTES / training.loss_chunks + 2 * 2,
            "fused": 0.0,
        }[training.loss]
    )
    last_norm = (4 + (1 if adapter else 2) * width) * shape.hidden
    loss = tokens * max(logits + last_norm, (20 + 2 * width) * shape.hidden)
    layer = scores + tokens * _layer_backward(
        shape, adapter=adapter, compute_bytes=width, mlp_tiles=training.mlp_tiles
    )
    if training.checkpointing or training.offload_activations:
        layer += saved
    if training.context_parallel > 1:
        layer += _attended(shape, width) * tokens
    if training.quantization:
        layer += parameters.largest_matrix * width
    if training.dense_mask:
        activations += training.sequence_len**2 * training.micro_batch_size
    return activations, loss, max(0.0, layer - loss)


def _saved(shape: ModelShape, parameters: Parameters, training: Training) -> float:
    saved = saved_by_layer(
        shape,
        adapter=parameters.trained_base == 0,
        compute_bytes=training.compute_bytes,
        mlp_tiles=training.mlp_tiles,
    )
    if training.shifted_copies:
        units = shape.heads if shape.kv_heads == 1 else shape.kv_heads
        saved += (units // 2) / units * _attended(shape, training.compute_bytes)
    return saved * training.tokens


def _offloaded_layers(shape: ModelShape, parameters: Parameters, training: Training) -> float:
    """Bytes of frozen weights that `layer_offloading` moves to the CPU."""
    if not training.offload_layers or training.offload_weights or parameters.trained_base:
        return 0.0
    everything = _base_weights(parameters, training, training.compute_bytes)
    in_layers = everything - training.compute_bytes * parameters.outside_layers
    return in_layers * max(0.0, 1 - LAYERS_ON_GPU / shape.layers)


def host_memory(shape: ModelShape, parameters: Parameters, training: Training) -> float:
    """Bytes of CPU memory that one GPU's process takes for what it moves off the GPU.

    Kept activations (all a layer saves, unless they are checkpointed) and layers; what DeepSpeed
    and FSDP offload is not in it.
    """
    bytes_ = _offloaded_layers(shape, parameters, training)
    if training.offload_activations:
        if training.checkpointing:
            bytes_ += training.compute_bytes * shape.hidden * training.tokens * shape.layers
        else:
            bytes_ += _saved(shape, parameters, training) * shape.layers
    return bytes_


def _base_weights(parameters: Parameters, training: Training, trained_width: int) -> float:
    width = training.compute_bytes
    frozen = parameters.base - parameters.trained_base
    plain = parameters.trained_base * trained_width
    if training.quantization == "nf4":
        return (
            plain + parameters.quantizable * NF4_BYTES + (frozen - parameters.quantizable) * width
        )
    if training.quantization == "int8":
        rows = 4 * parameters.quantizable_rows
        return plain + parameters.quantizable + rows + (frozen - parameters.quantizable) * width
    return plain + frozen * width
