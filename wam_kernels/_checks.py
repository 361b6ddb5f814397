"""Argument checks shared by every public op. Metadata only: no values are read, so they trace."""

from torch import Tensor


def bind_dims(op: str, **args: tuple[Tensor, str]) -> dict[str, int]:
    """Match tensors to letters, ``x=(x, "B S D")``, and return the size of each letter.

    Raises:
        ValueError: a tensor of another rank, or a letter with two sizes; names the op, argument and both shapes.
    """
    dims: dict[str, int] = {}
    for name, (tensor, spec) in args.items():
        letters = spec.split()
        fits = tensor.ndim == len(letters)
        if fits:
            for letter, size in zip(letters, tensor.shape, strict=True):
                fits = fits and dims.setdefault(letter, size) == size
        if not fits:
            want = ", ".join(f"{k}={dims[k]}" if k in dims else k for k in letters)
            raise ValueError(f"{op}: {name} must have shape [{want}], got {list(tensor.shape)}")
    return dims


def same_kind(op: str, like_name: str, like: Tensor, **args: Tensor) -> None:
    """Every tensor has the dtype and device of ``like``.

    Raises:
        ValueError: names the op, the argument, both dtypes and both devices.
    """
    for name, t in args.items():
        if t.dtype != like.dtype or t.device != like.device:
            raise ValueError(
                f"{op}: {name} must be {like.dtype} on {like.device} like {like_name}, got {t.dtype} on {t.device}"
            )
