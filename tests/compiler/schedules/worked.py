"""Action tables of the papers and of Megatron, as text: what each coordinate runs, in order.

Upper case is chunk 0 or copy 0, lower case chunk 1 or copy 1: F forward, B backward for inputs,
W for weights, D both, & a pair that may overlap; the number is the microbatch.
"""

from __future__ import annotations

TABLES = {
    ("1f1b", 2, 4, 1): """
        F0 F1 D0 F2 D1 F3 D2 D3
        F0 D0 F1 D1 F2 D2 F3 D3
    """,
    ("zb", 2, 4, 1): """
        F0 F1 D0 F2 D1 F3 D2 D3
        F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3
    """,
    ("interleaved", 2, 4, 2): """
        F0 F1 f0 f1 F2 d0 F3 d1 f2 D0 f3 D1 d2 d3 D2 D3
        F0 F1 f0 d0 f1 d1 F2 D0 F3 D1 f2 d2 f3 d3 D2 D3
    """,
    ("zbv", 2, 4, 2): """
        F0 F1 F2 f0 d0 f1 d1 F3 D0 f2 d2 D1 f3 d3 D2 D3
        F0 f0 F1 f1 d0 F2 D0 f2 d1 F3 D1 f3 d2 B2 b3 B3 W2 w3 W3
    """,
    ("dualpipe", 2, 4, 1): """
        F0 f2 F1 d2 f3&D0 d3 D1
        f2 F0 f3 D0 F1&d2 D1 d3
    """,
    ("dualpipev", 2, 4, 2): """
        F0 F1 F2 f0 d0 f1 F3&d1 f2&D0 d2 f3&D1 d3 D2 D3
        F0 f0 F1 f1 F2 d0 f2&D0 F3&d1 f3&D1 d2 D2 b3 B3 w3 W3
    """,
    ("1f1b", 4, 8, 1): """
        F0 F1 F2 F3 D0 F4 D1 F5 D2 F6 D3 F7 D4 D5 D6 D7
        F0 F1 F2 D0 F3 D1 F4 D2 F5 D3 F6 D4 F7 D5 D6 D7
        F0 F1 D0 F2 D1 F3 D2 F4 D3 F5 D4 F6 D5 F7 D6 D7
        F0 D0 F1 D1 F2 D2 F3 D3 F4 D4 F5 D5 F6 D6 F7 D7
    """,
    ("interleaved", 4, 8, 2): """
        F0 F1 F2 F3 f0 f1 f2 f3 F4 F5 F6 d0 F7 d1 f4 d2 f5 d3 f6 D0 f7 D1 D2 D3 d4 d5 d6
            d7 D4 D5 D6 D7
        F0 F1 F2 F3 f0 f1 f2 f3 F4 d0 F5 d1 F6 d2 F7 d3 f4 D0 f5 D1 f6 D2 f7 D3 d4 d5 d6
            d7 D4 D5 D6 D7
        F0 F1 F2 F3 f0 f1 f2 d0 f3 d1 F4 d2 F5 d3 F6 D0 F7 D1 f4 D2 f5 D3 f6 d4 f7 d5 d6
            d7 D4 D5 D6 D7
        F0 F1 F2 F3 f0 d0 f1 d1 f2 d2 f3 d3 F4 D0 F5 D1 F6 D2 F7 D3 f4 d4 f5 d5 f6 d6 f7
            d7 D4 D5 D6 D7
    """,
    ("zb", 4, 8, 1): """
        F0 F1 F2 F3 D0 F4 D1 F5 D2 F6 D3 F7 D4 D5 D6 D7
        F0 F1 F2 B0 F3 B1 W0 F4 B2 W1 F5 B3 W2 F6 B4 W3 F7 B5 W4 B6 W5 B7 W6 W7
        F0 F1 B0 F2 B1 F3 B2 W0 F4 B3 W1 F5 B4 W2 F6 B5 W3 F7 B6 W4 B7 W5 W6 W7
        F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1 F5 B5 W2 F6 B6 W3 F7 B7 W4 W5 W6 W7
    """,
    ("zbv", 4, 8, 2): """
        F0 F1 F2 F3 F4 F5 F6 f0 d0 f1 d1 f2 d2 f3 d3 F7 D0 f4 d4 D1 f5 d5 D2 f6 d6 D3 f7
            d7 D4 D5 D6 D7
        F0 F1 F2 F3 F4 f0 F5 f1 d0 f2 d1 f3 d2 F6 D0 f4 d3 F7 D1 f5 d4 D2 f6 d5 D3 f7 d6
            B4 b7 B5 W4 B6 W5 B7 W6 w7 W7
        F0 F1 F2 f0 F3 f1 F4 f2 d0 f3 d1 F5 D0 f4 d2 F6 D1 f5 d3 F7 D2 f6 d4 D3 f7 d5 B4
            b6 B5 b7 B6 W4 B7 W5 w6 w7 W6 W7
        F0 f0 F1 f1 F2 f2 F3 f3 d0 F4 D0 f4 d1 F5 D1 f5 d2 F6 D2 f6 d3 F7 D3 f7 d4 B4 b5
            B5 b6 B6 b7 B7 W4 w5 w6 w7 W5 W6 W7
    """,
    ("dualpipe", 4, 8, 1): """
        F0 F1 F2 f4 d4 f5 F3&d5 f6&D0 d6 f7&D1 d7 D2 D3
        F0 f4 F1 f5 F2 d4 f6&D0 F3&d5 f7&D1 d6 D2 b7 B3 w7 W3
        f4 F0 f5 F1 f6 D0 F2&d4 f7&D1 F3&d5 D2 d6 B3 b7 W3 w7
        f4 f5 f6 F0 D0 F1 f7&D1 F2&d4 D2 F3&d5 D3 d6 d7
    """,
}
"""By schedule, coordinates, microbatches and stages per coordinate; lines further in go on."""
