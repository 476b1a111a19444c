"""Relative error and size of int4 weights, by group size and by the candidates for a group's scale.

    python -m benchmarks.int4_group

Prints a Markdown table; docs/measurements.md keeps one. Error is |W' - W| / |W| over the whole matrix, in percent.
"""

import argparse
from collections.abc import Mapping, Sequence

import torch

from glm.quantization import INT4_GROUP_SIZE, INT4_LEVELS, int4_scales, round_to_scale

GROUP_SIZES = (16, 32, 64, 128)
CANDIDATES: Mapping[str, Sequence[float]] = {
    "8": (8.0,),
    "7, 8": (7.0, 8.0),
    "7.5, 8, 8.5": (7.5, 8.0, 8.5),
    "7.5 to 9.5 by 0.5": (7.5, 8.0, 8.5, 9.0, 9.5),
    "7 to 11 by 0.5": tuple(level / 2 for level in range(14, 23)),
    "7 to 13 by 0.1": tuple(level / 10 for level in range(70, 131)),
}


def matrices(num_rows: int, num_columns: int) -> dict[str, torch.Tensor]:
    """Weights as trained layers have them, from mild to nasty: normal, heavy-tailed, and with a few large columns."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(num_rows, num_columns, generator=generator) / num_columns**0.5
    squares = torch.randn(4, num_rows, num_columns, generator=generator).square_().mean(0)
    outliers = normal.clone()
    outliers[:, ::128] *= 10
    return {"normal": normal, "Student t, 4 degrees": normal / squares.sqrt_(), "1 column in 128 x10": outliers}


def relative_error(weight: torch.Tensor, group: int, levels: Sequence[float]) -> float:
    """|W' - W| / |W| of int4 with this group size and these candidates."""
    grouped = weight.view(weight.shape[0], -1, group)
    scales = int4_scales(grouped, levels)
    restored = round_to_scale(grouped, scales, bits=4) * scales.unsqueeze(-1)
    return float((restored - grouped).norm() / grouped.norm())


def published_error(weight: torch.Tensor, bits: int) -> float:
    """The same of the published scheme: one scale for a row, largest magnitude over 7 (or 127)."""
    scales = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return float(((weight / scales).round() * scales - weight).norm() / weight.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--columns", type=int, default=4096)
    arguments = parser.parse_args()
    weights = matrices(arguments.rows, arguments.columns)
    print(f"| scheme | bits a weight | {' | '.join(weights)} |")
    print("| --- | --- |" + " --- |" * len(weights))
    for bits in (8, 4):
        errors = " | ".join(f"{100 * published_error(w, bits):.2f}" for w in weights.values())
        print(f"| int{bits}, a scale per row | {bits + 16 / arguments.columns:.2f} | {errors} |")
    for group in GROUP_SIZES:
        for name, levels in CANDIDATES.items():
            errors = " | ".join(f"{100 * relative_error(w, group, levels):.2f}" for w in weights.values())
            chosen = " (chosen)" if (group, set(levels)) == (INT4_GROUP_SIZE, set(INT4_LEVELS)) else ""
            print(f"| int4, groups of {group}, levels {name}{chosen} | {4 + 16 / group:.2f} | {errors} |")


if __name__ == "__main__":
    main()
