"""Triton kernels, which only `ops` calls. Where Triton is not installed the module still imports, and `AVAILABLE` is False."""

from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)

AVAILABLE = hasattr(triton, "cdiv")
GROUP = 128  # values that share a scale, along the inner dimension of the product

# Largest number of rows -> rows and columns of a tile, warps, stages. Chosen by reasoning, not yet by measurement: few rows are
# bound by reading the weight, for which the tiles must be many; many rows by the products.
_TILES = {16: (16, 32, 4, 5), 64: (64, 64, 4, 4)}
_LARGE = (128, 128, 8, 3)


@triton.jit
def _quantize_rows(
    x,
    quantized,
    scales,
    rows,
    columns,
    UE8M0: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    """One scale for every 1 x GROUP of `x`: amax / FP8_MAX, or the next power of two."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-4) / FP8_MAX
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(quantized + place, (values / scale[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row * tl.cdiv(columns, GROUP) + group, scale, mask=row < rows)


@triton.jit
def _block_scaled_product(
    x,
    x_scales,
    weight,
    weight_scales,
    output,
    rows,
    columns,
    inner,
    WEIGHT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of `x @ weight.T`: products of GROUP values in FP8, summed in fp32 after their scales."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    groups = tl.cdiv(inner, GROUP)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for group in range(groups):
        k = group * GROUP + tl.arange(0, GROUP)
        left = tl.load(
            x + row.to(tl.int64)[:, None] * inner + k[None, :],
            mask=(row < rows)[:, None] & (k < inner)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + column.to(tl.int64)[None, :] * inner + k[:, None],
            mask=(column < columns)[None, :] & (k < inner)[:, None],
            other=0.0,
        )
        left_scale = tl.load(x_scales + row * groups + group, mask=row < rows, other=0.0)
        right_scale = tl.load(
            weight_scales + (column // WEIGHT_ROWS) * groups + group, mask=column < columns, other=0.0
        )
        total += tl.dot(left, right) * left_scale[:, None] * right_scale[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(
        output + place, total.to(output.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :]
    )


def ceil_div(number: int, divisor: int) -> int:
    """`number / divisor` rounded up. Triton's own `cdiv` cannot be traced by torch.compile."""
    return -(-number // divisor)


def quantize_rows(x: torch.Tensor, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` `[M, K]` -> E4M3 `[M, K]` and fp32 scales `[M, ceil(K / 128)]`."""
    rows, columns = x.shape
    groups = ceil_div(columns, GROUP)
    quantized = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    tile = 1 if rows <= 16 else 16
    _quantize_rows[ceil_div(rows, tile), groups](
        x.contiguous(), quantized, scales, rows, columns, UE8M0=ue8m0, ROWS=tile, GROUP=GROUP, FP8_MAX=448.0
    )
    return quantized, scales


def block_scaled_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, weight_rows: int, ue8m0: bool
) -> torch.Tensor:
    """`x` `[M, K]` times the E4M3 `weight` `[N, K]` with a scale per `weight_rows` x 128: `[M, N]` in the dtype of `x`."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # where Triton launches
            return block_scaled_product(x, weight, scale, weight_rows, ue8m0)
    (rows, inner), columns = x.shape, weight.shape[0]
    quantized, x_scales = quantize_rows(x, ue8m0)
    output = x.new_empty(rows, columns)
    tile = next((tile for most, tile in _TILES.items() if rows <= most), _LARGE)
    _block_scaled_product[ceil_div(columns, tile[1]), ceil_div(rows, tile[0])](
        quantized,
        x_scales,
        weight.contiguous(),
        scale.float().contiguous(),
        output,
        rows,
        columns,
        inner,
        WEIGHT_ROWS=weight_rows,
        ROWS=tile[0],
        COLUMNS=tile[1],
        GROUP=GROUP,
        num_warps=tile[2],
        num_stages=tile[3],
    )
    return output
