"""What a run says of the rows that its processes share."""

from __future__ import annotations

import pytest

from longlora_plugin.attention.shards import Exchange
from longlora_plugin.attention.sharing import told


@pytest.mark.parametrize(
    ("exchange", "line"),
    [
        (
            Exchange(8, 32768, 4096, 1, 8_388_608, 939_524_096),
            "context parallel over 8 processes: 32768 tokens each, up to 4096 more from the "
            "process before it (8.39 MB a layer; ring attention: 940 MB)",
        ),
        (
            Exchange(4, 10, 25, 3, 512, 3_758_096_384),
            "context parallel over 4 processes: 10 tokens each, up to 25 more from the 3 processes "
            "before it (512 bytes a layer; ring attention: 3.76 GB)",
        ),
        (
            Exchange(2, 64, 0, 0, 0, 4096),
            "context parallel over 2 processes: 64 tokens each, none from others (0 bytes a layer; "
            "ring attention: 4.1 KB)",
        ),
    ],
)
def test_the_first_step_tells_tokens_hops_and_bytes(exchange: Exchange, line: str) -> None:
    assert told(exchange) == line
