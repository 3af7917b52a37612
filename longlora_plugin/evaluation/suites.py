"""Which tasks of lm-eval a suite is, what data they need, and what is run by its authors' scripts.

Loads nothing of lm-eval.
"""

from __future__ import annotations

NIAH_OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")
RULER_OFFLINE = (*NIAH_OFFLINE, "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks whose texts are made on the spot."""
RULER_ESSAYS = (
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multiquery",
    "niah_multivalue",
)
RULER_QUESTIONS = ("ruler_qa_squad", "ruler_qa_hotpot")
RULER = (*RULER_OFFLINE, *RULER_ESSAYS, *RULER_QUESTIONS)

SUITES: dict[str, tuple[str, ...]] = {
    "ruler": RULER,
    "ruler-offline": RULER_OFFLINE,
    "longbench2": ("longbench2",),
    "babilong": tuple(f"babilong_qa{number}" for number in range(1, 6)),
    "graphwalks": ("graphwalks_128k",),
    "short": ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa"),
}
"""Suite → tasks or groups of lm-eval."""

QUESTIONS_FROM = 4096
"""Tokens from which on RULER's questions hold more than the documents that answer them."""

EXTERNAL = {
    "helmet": """# HELMET (MIT; its data sets have licences of their own)
git clone https://github.com/princeton-nlp/HELMET && cd HELMET
pip install -r requirements.txt && bash scripts/download_data.sh
for task in recall rag longqa summ icl rerank cite; do  # $task: 128k, ${{task}}_short: 8k to 64k
  python eval.py --config configs/{helmet}.yaml --model_name_or_path {merged} \\
    --output_dir output/longlora  # a model without a chat template: --use_chat_template False
done  # then cite: eval_alce.py; longqa and summ: scripts/eval_gpt4_*.py, a paid judge""",
    "nolima": """# NoLiMa (code and needles: Adobe Research License, no commercial use)
git clone https://github.com/adobe-research/NoLiMa && cd NoLiMa
pip install -r requirements.txt && bash data/download_NoLiMa_data.sh
vllm serve {merged} --max-model-len {length} &
cd evaluation && sed 's#"model": .*#"model": "{merged}",#' model_configs/llama_3.3_70b.json \\
  > model_configs/longlora.json
sed -i 's/gpt_4o_20241120/longlora/' run_config/*.yaml && bash run_tests.sh  # 250 to 32k tokens""",
    "longbench-original": """# LongBench v2 by its authors (MIT)
git clone https://github.com/THUDM/LongBench && cd LongBench
pip install -r requirements.txt
vllm serve {merged} --api-key token-abc123 --max-model-len {length} &
# add "longlora": "{merged}" to config/model2path.json and its tokens to config/model2maxlen.json
python pred.py --model longlora && python result.py""",
}
"""Benchmarks that are on no package registry → the commands for a merged model."""
HELMET_LENGTH = 131072
"""Tokens of HELMET's long configs; its short ones hold four lengths each."""


def makes_its_text(task: str) -> bool:
    """Whether a task's text has the length that is asked for."""
    return task in RULER or task.startswith("babilong")


def has_length(task: str, length: int) -> bool:
    """Whether a task has texts of this length; BABILong has a data set for each power of two."""
    return not task.startswith("babilong") or (length >= 1024 and length.bit_count() == 1)


def metadata_for(task: str, length: int, tokenizer: str) -> dict[str, object]:
    """What lm-eval's task is told about the length."""
    if task.startswith("babilong"):
        return {"max_seq_lengths": f"{length // 1024}k"}
    return {"max_seq_lengths": [length], "pretrained": tokenizer}
