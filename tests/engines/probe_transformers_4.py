"""cos and sin that the transformers of this environment rotates by; run by `test_transformers_4`.

python probe_transformers_4.py LENGTH FOLDER…    writes FOLDER/rotary.npz
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

length = int(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, length, 1), torch.arange(length)[None])
    np.savez(folder / "rotary.npz", cos=cos.numpy(), sin=sin.numpy())
