"""Pre-train the bundled small model: ``python examples/quickstart/pretrain.py TEXT_DIR MODEL_DIR``.

A Llama of 3.5 million parameters with its own byte-level BPE tokenizer, trained at a context of
256 tokens on the books that ``text.py`` writes. It exists so that extending a context can be tried
from end to end in minutes, on a CPU and without a model hub; it is no use as a language model.

The defaults below are the ones that the committed ``model/`` was made with (see its README.md).
``training.json`` records the command, the figures and the versions of a run. The same seed and
number of threads give the same model on the same machine and versions.

Shapes: B windows a batch, T = context, V = vocabulary.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("text_dir", type=Path, help="folder with train.jsonl and heldout.jsonl")
    parser.add_argument("model_dir", type=Path, help="folder to write the model to")
    shape = parser.add_argument_group("model")
    shape.add_argument("--vocab-size", type=int, default=2048)
    shape.add_argument("--context", type=int, default=256, help="tokens; no position beyond it")
    shape.add_argument("--hidden-size", type=int, default=256)
    shape.add_argument("--intermediate-size", type=int, default=704)
    shape.add_argument("--layers", type=int, default=4)
    shape.add_argument("--heads", type=int, default=8)
    shape.add_argument("--kv-heads", type=int, default=4, help="fewer than heads: grouped-query")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=4000)
    training.add_argument("--batch-size", type=int, default=16, help="windows of CONTEXT tokens")
    training.add_argument("--learning-rate", type=float, default=2e-3, help="peak, after warm-up")
    training.add_argument("--final-lr-share", type=float, default=0.05, help="end of the cosine")
    training.add_argument("--warmup-steps", type=int, default=200)
    training.add_argument("--weight-decay", type=float, default=0.1, help="matrices only")
    training.add_argument("--beta2", type=float, default=0.95)
    training.add_argument("--clip-norm", type=float, default=1.0)
    training.add_argument("--eval-every", type=int, default=250, help="steps")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def read_texts(path: Path) -> list[str]:
    if not path.is_file():
        sys.exit(f"pretrain.py: {path} is missing; write it with text.py {path.parent}")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte has a token, so any text is encoded without loss."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    return [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in texts]


def cut(document: Tensor, context: int, offset: int = 0) -> Tensor:
    """Cut a document into windows ``[n, T + 1]``: T inputs and their T next tokens.

    Neighbours share one token, so that each token is predicted once. The rest that does not fill
    a window is dropped.
    """
    return document[offset:].unfold(0, context + 1, context)


def training_batches(
    documents: list[Tensor], context: int, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Yield batches ``[B, T + 1]`` for ever; no window holds tokens of two documents.

    Each epoch cuts every document anew at a random offset, so that a token meets different
    contexts, and adds the document's opening, the only place where BOS stands.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        windows = [document[None, : context + 1] for document in documents]
        for document in documents:
            offset = int(torch.randint(context, (1,), generator=generator))
            windows.append(cut(document, context, offset))
        epoch = torch.cat(windows)
        order = torch.randperm(len(epoch), generator=generator)
        yield from epoch[order[: len(epoch) // batch_size * batch_size]].split(batch_size)


def token_losses(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each next token: ``[B, T + 1]`` → ``[B, T]``."""
    logits_BTV = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.transpose(1, 2), windows[:, 1:], reduction="none")


@torch.no_grad()
def heldout_losses(model: LlamaForCausalLM, windows: Tensor, batch_size: int = 32) -> Tensor:
    """Mean loss at each position of the context, ``[T]``."""
    model.eval()
    losses = torch.cat([token_losses(model, batch) for batch in windows.split(batch_size)])
    model.train()
    return losses.mean(0)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from the peak to its final share."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    floor = args.final_lr_share
    return args.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(
    model: LlamaForCausalLM, documents: list[Tensor], heldout: Tensor, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Train in place, leave the weights with the lowest held-out loss, and return the log."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}],
        betas=(0.9, args.beta2),
        weight_decay=0.0,
    )
    log: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    started, running = time.monotonic(), 0.0
    batches = training_batches(documents, args.context, args.batch_size, args.seed)
    for step, batch in zip(range(args.steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = token_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % args.eval_every and step + 1 != args.steps:
            continue
        since = step + 1 - (log[-1]["step"] if log else 0)
        row = {"step": step + 1, "train_loss": running / since, "seconds": 0.0}
        row["heldout_loss"] = heldout_losses(model, heldout).mean().item()
        row["seconds"] = time.monotonic() - started
        if not log or row["heldout_loss"] < min(r["heldout_loss"] for r in log):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        log.append({name: round(value, 4) for name, value in row.items()})
        running = 0.0
        print(
            f"step {step + 1:5d}/{args.steps}  train loss {row['train_loss']:.3f}  held-out loss "
            f"{row['heldout_loss']:.3f} (perplexity {math.exp(row['heldout_loss']):.1f})  "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
    model.load_state_dict(best)
    return log


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)

    train_texts = read_texts(args.text_dir / "train.jsonl")
    heldout_texts = read_texts(args.text_dir / "heldout.jsonl")
    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    documents = encode(tokenizer, train_texts)
    heldout_documents = encode(tokenizer, heldout_texts)
    heldout = torch.cat([cut(document, args.context) for document in heldout_documents])
    model = build_model(tokenizer, args)
    train_tokens = sum(map(len, documents))
    print(
        f"{model.num_parameters():,} parameters; {train_tokens:,} training tokens in "
        f"{len(documents)} books, {sum(map(len, heldout_documents)):,} held-out tokens in "
        f"{len(heldout_documents)}; {args.steps * args.batch_size * args.context:,} to train on",
        flush=True,
    )
    log = train(model, documents, heldout, args)

    # Stored in bfloat16, half the size for a change of perplexity in the fourth digit. The config
    # still says float32: loaded without a dtype it then computes in float32, as a CPU wants.
    model.to(torch.bfloat16).save_pretrained(args.model_dir)
    tokenizer.save_pretrained(args.model_dir)
    config_file = args.model_dir / "config.json"
    config = json.loads(config_file.read_text()) | {"dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2) + "\n")

    losses_T = heldout_losses(LlamaForCausalLM.from_pretrained(args.model_dir), heldout)
    edges = [0, *(2**k for k in range(5, 20) if 2**k < args.context), args.context]
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "options": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "parameters": model.num_parameters(),
        "train_books": len(documents),
        "train_tokens": train_tokens,
        "heldout_books": len(heldout_documents),
        "heldout_tokens": sum(map(len, heldout_documents)),
        "tokens_trained_on": args.steps * args.batch_size * args.context,
        "epochs": round(args.steps * args.batch_size * args.context / train_tokens, 2),
        "kept_step": min(log, key=lambda row: row["heldout_loss"])["step"],
        "final_train_loss": log[-1]["train_loss"],
        "heldout_loss": round(losses_T.mean().item(), 4),
        "heldout_perplexity": round(losses_T.mean().exp().item(), 2),
        "heldout_perplexity_by_position": {
            f"{low}-{high}": round(losses_T[low:high].mean().exp().item(), 2)
            for low, high in zip(edges, edges[1:], strict=False)
        },
        "seconds": log[-1]["seconds"],
        "log": log,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}",
    }
    (args.model_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k.startswith("heldout")}, indent=2))


if __name__ == "__main__":
    main()
