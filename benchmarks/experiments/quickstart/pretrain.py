"""Pre-train the bundled small model.

    python -m benchmarks.experiments.quickstart.pretrain TEXT_DIR MODEL_DIR

A Llama of 3.5 million parameters with its own byte-level BPE tokenizer, trained at a context of
256 tokens on the books that ``text.py`` writes. It exists so that extending a context can be tried
from end to end in minutes, on a CPU and without a model hub; it is no use as a language model.

The defaults below are the ones that the committed ``model/`` was made with (see its README.md).
``training.json`` records the command, the figures and the versions of a run. The same seed and
number of threads give the same model on the same machine and versions. On a machine that others
use too, set OMP_WAIT_POLICY=PASSIVE: threads that wait for each other by spinning lost a factor of
four there.

Shapes: B windows a batch, T = context, V = vocabulary.
"""

import argparse
import json
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
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

HYPERPARAMETERS = {
    "vocab_size": (2048, "tokens"),
    "context": (256, "tokens; the model sees no position beyond it"),
    "hidden_size": (256, "width"),
    "intermediate_size": (704, "width of the feed-forward layers"),
    "layers": (4, "decoder layers"),
    "heads": (8, "query heads"),
    "kv_heads": (4, "key and value heads; fewer than --heads is grouped-query attention"),
    "steps": (2500, "optimizer steps"),
    "batch_size": (16, "windows of --context tokens"),
    "learning_rate": (2e-3, "of AdamW, at its peak"),
    "final_lr_share": (0.05, "of the peak, where the cosine ends"),
    "warmup_steps": (200, "linear, from 0 to the peak"),
    "weight_decay": (0.1, "of matrices; none on the norms"),
    "beta2": (0.95, "of AdamW; beta1 is 0.9"),
    "clip_norm": (1.0, "largest gradient norm"),
    "precision": ("bf16", "of matrix products, bf16 or fp32; weights train in float32 either way"),
    "eval_every": (250, "steps between looks at the held-out loss"),
    "seed": (0, "of the weights and of the order of the windows"),
    "threads": (2, "of the CPU"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("text_dir", type=Path, help="folder with train.jsonl and heldout.jsonl")
    parser.add_argument("model_dir", type=Path, help="folder to write the model to")
    for name, (default, description) in HYPERPARAMETERS.items():
        choices = ["bf16", "fp32"] if name == "precision" else None
        kind = type(default)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default, choices=choices, help=description)
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
    logits_BTV = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    targets_BT = windows[:, 1:]
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    return losses.view_as(targets_BT)


@torch.no_grad()
def heldout_losses(model: LlamaForCausalLM, windows: Tensor, batch_size: int = 32) -> Tensor:
    """Mean loss at each position of the context, ``[T]``."""
    model.eval()
    losses = torch.cat([token_losses(model, batch) for batch in windows.split(batch_size)])
    model.train()
    return losses.mean(0)


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
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, args.beta2),
        weight_decay=args.weight_decay,
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, args.warmup_steps, args.steps, min_lr_rate=args.final_lr_share
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")
    log: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    started, running = time.monotonic(), 0.0
    batches = training_batches(documents, args.context, args.batch_size, args.seed)
    for step, batch in zip(range(args.steps), batches, strict=False):
        with autocast:
            loss = token_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % args.eval_every and step + 1 != args.steps:
            continue
        with autocast:
            heldout_loss = heldout_losses(model, heldout).mean().item()
        if all(heldout_loss < row["heldout_loss"] for row in log):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        train_loss = running / (step + 1 - (log[-1]["step"] if log else 0))
        running = 0.0
        row = {"step": step + 1, "train_loss": train_loss, "heldout_loss": heldout_loss}
        log.append({name: round(value, 4) for name, value in row.items()})
        log[-1]["seconds"] = round(time.monotonic() - started)
        print(json.dumps(log[-1]), flush=True)
    model.load_state_dict(best)
    return log


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> None:
    """Save weights in bfloat16: half the size, for no visible change of the held-out perplexity.

    Two entries are put right for whoever loads the folder. The config says float32, so that a
    load without a dtype computes in float32, as a CPU wants, rather than in the stored type. The
    tokenizer class is the one that transformers 4 and 5 both know; 5 writes a name of its own.
    """
    model.to(torch.bfloat16).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    for name, entry in (
        ("config.json", {"dtype": "float32"}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        content = json.loads((model_dir / name).read_text()) | entry
        (model_dir / name).write_text(json.dumps(content, indent=2) + "\n")


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
    size = {
        "parameters": model.num_parameters(),
        "train_books": len(documents),
        "train_tokens": sum(map(len, documents)),
        "heldout_books": len(heldout_documents),
        "heldout_tokens": sum(map(len, heldout_documents)),
        "tokens_trained_on": args.steps * args.batch_size * args.context,
    }
    print(json.dumps(size), flush=True)
    log = train(model, documents, heldout, args)
    save(model, tokenizer, args.model_dir)

    losses_T = heldout_losses(LlamaForCausalLM.from_pretrained(args.model_dir), heldout)
    eighth = args.context // 8
    buckets = [(0, eighth), (eighth, 2 * eighth), (2 * eighth, 4 * eighth), (4 * eighth, None)]
    perplexity_by_position = {
        f"{low}-{high or args.context}": round(losses_T[low:high].mean().exp().item(), 2)
        for low, high in buckets
    }
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "hyperparameters": {name: getattr(args, name) for name in HYPERPARAMETERS},
        **size,
        "kept_step": min(log, key=lambda row: row["heldout_loss"])["step"],
        "final_train_loss": log[-1]["train_loss"],
        "heldout_loss": round(losses_T.mean().item(), 4),
        "heldout_perplexity": round(losses_T.mean().exp().item(), 2),
        "heldout_perplexity_by_position": perplexity_by_position,
        "seconds": log[-1]["seconds"],
        "log": log,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        },
    }
    (args.model_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({name: record[name] for name in record if "heldout" in name}, indent=2))


if __name__ == "__main__":
    main()
