"""Test-only Axolotl plugin: keeps the first training batch, its loss and the documents S² saw."""

from __future__ import annotations

import os

import torch
from axolotl.integrations.base import BasePlugin


class BatchRecorder(BasePlugin):
    def post_model_load(self, cfg, model):
        from longlora_plugin.attention.install import ShiftedAttention

        seen = []
        stock_find = ShiftedAttention._find_documents

        def find(handle, *given):
            seen.append(stock_find(handle, *given))
            return seen[-1]

        ShiftedAttention._find_documents = find

        def record(module, args, kwargs, output):
            path = os.environ["BATCH_RECORD"]
            if module.training and not os.path.exists(path):
                torch.save(
                    {
                        "input_ids": kwargs["input_ids"],
                        "labels": kwargs["labels"],
                        "loss": output.loss.detach(),
                        "documents": seen[-1].intervals,
                    },
                    path,
                )

        model.register_forward_hook(record, with_kwargs=True)
